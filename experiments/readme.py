"""Writes measured results into the README: what stands between its markers, and the figure.

python -m experiments.readme outputs/batch_size_invariance

The study's tables and findings come from that directory. `python -m experiments.benchmark --record` writes the price.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from rich.console import Console

from experiments import report
from experiments.atomic import atomic_write
from experiments.description import Description
from experiments.documents import fill, markdown
from experiments.errors import UserError, command_line
from experiments.recorded import essential
from experiments.report import Shown

README = Path("README.md")
FIGURE = Path("docs/batch_size_invariance.png")


def section(outcome: Shown, description: Description) -> str:
    """Findings first, then the tables that they quote."""
    machine = ", ".join(f"{key} {value}" for key, value in description.environment.items())
    told = [f"- {f.bar}: **{f.verdict}**. {f.sentence}" if f.verdict else f"- {f.sentence}" for f in outcome.findings]
    parts = [
        f"`{essential(description.command)}`, {len(description.jobs)} runs; {machine}.",
        "\n".join(told),
        *map(markdown, outcome.tables[:3]),
    ]
    return "\n\n".join(parts)


def write(directory: Path) -> None:
    """Make the report again, and bring README and figure up to date."""
    if not README.exists():
        raise UserError(f"there is no {README} here: run this where it lies")
    text = fill(README.read_text(encoding="utf-8"), "results", "", README)  # markers first: the analysis takes a while
    outcome = report.remake(directory, Console(quiet=True))
    text = fill(text, "results", section(outcome, Description.load(directory)), README)
    with atomic_write(README) as file:
        file.write(text.encode())
    FIGURE.parent.mkdir(exist_ok=True)
    shutil.copyfile(outcome.figure, FIGURE)
    print(f"written: {README}, {FIGURE}")


def main() -> None:
    with command_line():
        write(report.directory_argument("experiments.readme"))


if __name__ == "__main__":
    main()
