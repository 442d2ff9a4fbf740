"""Writes measured results into the README: what stands between its markers, and the figure.

python -m experiments.readme outputs/batch_size_invariance

The study's tables and findings come from that directory; the prices from outputs/benchmark.json and
outputs/memory.json, where `python -m experiments.benchmark` and `python -m experiments.memory` have written them.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments import report
from experiments.atomic import atomic_write
from experiments.errors import UserError, command_line
from experiments.report import Outcome
from experiments.tables import Table

README = Path("README.md")
FIGURE = Path("docs/batch_size_invariance.png")
BENCHMARK = Path("outputs/benchmark.json")
MEMORY = Path("outputs/memory.json")


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


def price(measured: dict[str, Any]) -> str:
    """The benchmark's table: a step with statistics over the plain step."""
    machine = ", ".join(f"{key} {value}" for key, value in measured["machine"].items())
    lines = ["| workload | statistics | ratio to the plain step | quartiles | steps |", "|---|---|---|---|---|"]
    for m in measured["results"]:
        between = f"{m['lower']:.2f} to {m['upper']:.2f}"
        lines.append(f"| {m['workload']} | {m['statistics']} | {m['ratio']:.2f} | {between} | {m['steps']} |")
    return "\n".join([*lines, "", f"Measured on: {machine}."])


def memory(measured: dict[str, Any]) -> str:
    """Peaks of a step, plain and with statistics, and what the second may come to."""
    rows = {
        "parameters": "parameters",
        "plain step": "plain",
        "with the exact second moment": "attached",
        "bar: plain step, one buffer like the parameters, 10%": "limit",
    }
    lines = ["| | MiB |", "|---|---|", *(f"| {title} | {measured[key]:.0f} |" for title, key in rows.items())]
    m = measured
    shape = f"{m['layers']} layers, d = {m['width']}, {m['words']} words, T = {m['positions']}, B = {m['batch_size']}"
    return "\n".join([*lines, "", f"{shape}; torch {m['torch']}, {m['machine']}."])


def fill(text: str, name: str, written: str, document: Path = README) -> str:
    """Replaces what stands between the document's markers called `name`. Raises: UserError if there are none."""
    markers = re.compile(rf"(<!-- {name}: .*? -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    if not markers.search(text):
        raise UserError(f"{document} has no lines '<!-- {name}: ... -->' and '<!-- /{name} -->' to write between")
    return markers.sub(lambda m: f"{m[1]}{written}\n{m[2]}", text)


def fill_document(document: Path, name: str, written: str) -> None:
    """`fill` in a file, by itself."""
    text = fill(document.read_text(encoding="utf-8"), name, written, document)
    with atomic_write(document) as file:
        file.write(text.encode())


def write(directory: Path) -> None:
    """Make the report again, and bring README and figure up to date."""
    if not README.exists():
        raise UserError(f"there is no {README} here: run this where it lies")
    text = fill(README.read_text(encoding="utf-8"), "results", "")  # markers first: the analysis takes a while
    outcome = report.remake(directory, Console(quiet=True))
    text = fill(text, "results", section(outcome, report.Description.load(directory)))
    if BENCHMARK.exists():
        text = fill(text, "price", price(json.loads(BENCHMARK.read_text())))
    if MEMORY.exists():
        text = fill(text, "memory", memory(json.loads(MEMORY.read_text())))
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
