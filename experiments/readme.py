"""Writes the results of a study into the README: what stands between its markers, and the figure.

python -m experiments.readme outputs/batch_size_invariance
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from rich.console import Console

from experiments import report
from experiments.atomic import atomic_write
from experiments.errors import UserError, command_line
from experiments.report import Outcome
from experiments.tables import Table

README = Path("README.md")
FIGURE = Path("docs/batch_size_invariance.png")
MARKERS = re.compile(r"(<!-- results: .*? -->\n).*?(<!-- /results -->)", re.DOTALL)


def markdown(table: Table) -> str:
    """A heading, the table in GitHub's form, and what its columns mean."""
    lines = [f"**{table.title}.** {table.explanation}", ""]
    lines += ["| " + " | ".join(table.columns) + " |", "|" + "---|" * len(table.columns)]
    for i, row in enumerate(table.rows):
        cells = [str(cell) for cell in row]
        cells[0] = f"**{cells[0]}**" if i in table.emphasised else cells[0]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def section(outcome: Outcome, description: report.Description) -> str:
    """Findings first, then the tables that they quote."""
    machine = ", ".join(f"{key} {value}" for key, value in description.environment.items())
    told = [f"- {f.bar}: **{f.verdict}**. {f.sentence}" if f.verdict else f"- {f.sentence}" for f in outcome.findings]
    parts = [
        f"`{description.command}`, {len(description.runs)} runs; {machine}.",
        "\n".join(told),
        *map(markdown, outcome.tables[:3]),
    ]
    return "\n\n".join(parts)


def write(directory: Path) -> None:
    """Make the report again, and bring README and figure up to date."""
    if not README.exists():
        raise UserError(f"there is no {README} here: run this where it lies")
    text = README.read_text(encoding="utf-8")
    if not MARKERS.search(text):
        raise UserError(f"{README} has no lines '<!-- results: ... -->' and '<!-- /results -->' to write between")
    outcome = report.remake(directory, Console(quiet=True))
    written = section(outcome, report.Description.load(directory))
    with atomic_write(README) as file:
        file.write(MARKERS.sub(lambda m: f"{m[1]}{written}\n{m[2]}", text).encode())
    FIGURE.parent.mkdir(exist_ok=True)
    shutil.copyfile(outcome.figure, FIGURE)
    print(f"written: {README}, {FIGURE}")


def main() -> None:
    with command_line():
        write(report.directory_argument("experiments.readme"))


if __name__ == "__main__":
    main()
