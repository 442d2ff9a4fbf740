"""One self-contained HTML page of whatever lies under some paths: a study, or any runs and sweeps of runs.

    python -m experiments.report outputs/batch_size_invariance     # a study: figure, findings, tables
    python -m experiments.report outputs/mine                      # a run, finished or not
    python -m experiments.report outputs/sweep outputs/other       # runs at any depth, grouped over their seeds

Runs have curves against examples seen, final values, the configuration keys in which they differ, and where they form a
grid also heat maps, scores and transfer regret. Of a study that is not finished, name the directory below it that its
runs are in.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape as escape_markup

from experiments import description
from experiments.atomic import atomic_write
from experiments.description import Description, Summary
from experiments.documents import Table
from experiments.errors import UserError, command_line
from experiments.estimate import Finding
from experiments.jobs import load
from experiments.pages import collection, study
from experiments.pages.groups import group
from experiments.pages.runs import collect
from experiments.pages.summary import final_values, findings
from experiments.themes import DARK, image

FILE = "report.html"


@dataclass(frozen=True)
class Shown:
    """What was written, and where the figure is."""

    tables: list[Table]
    findings: list[Finding]
    figure: Path


def remake(directory: Path, console: Console, output: Path | None = None) -> Shown:
    """Write figure.png, figure.svg, report.html and outcome.json from the results of the jobs; print the summary."""
    described = Description.load(directory)
    studied = described.study()
    results = [load(directory / place.directory, place.coordinates) for place in described.jobs]
    try:
        outcome = studied.outcome(results)
    except ValueError as error:
        raise UserError(f"{directory}: {error}") from error
    figure = outcome.write_figure(directory)
    light, dark = figure.with_suffix(".svg").read_bytes(), image(outcome.draw(DARK), "svg")
    seconds = sum({place.directory: r.core_seconds for place, r in zip(described.jobs, results, strict=True)}.values())
    summary = Summary(
        title=studied.title,
        question=studied.question,
        source=studied.source,
        command=described.command,
        note=studied.settings.note,
        jobs=len(results),
        seconds=seconds,
        environment=described.environment,
        caption=outcome.caption,
        alternative=outcome.alternative,
        findings=outcome.findings,
    )
    summary.save(directory)
    page = output or directory / FILE
    _write(page, study.page(summary, outcome, described, directory, light, dark))
    show(outcome.tables[:1], outcome.findings, console)
    console.print(f"report: {page}    figure: {figure}, {figure.with_suffix('.svg')}", soft_wrap=True)
    return Shown(outcome.tables, outcome.findings, figure)


def of_runs(paths: Sequence[Path], console: Console, output: Path | None = None) -> Path:
    """The page of all runs under the paths, in the one path, or beside the several; final values are printed."""
    found = group(collect(paths))
    page = output or (paths[0] if len(paths) == 1 else _beside(paths)) / FILE
    _write(page, collection.page(found, paths))
    table = final_values(found, collection.drawn(found))
    # In a terminal the label needs the room of the other columns.
    columns, rows = (table.columns, table.rows)
    narrow = dataclasses.replace(table, columns=[columns[0], *columns[2:4]], rows=[[r[0], *r[2:4]] for r in rows])
    show([narrow], findings(found), console)
    console.print(f"report: {page}", soft_wrap=True)
    return page


def show(tables: Sequence[Table], found: Sequence[Finding], console: Console) -> None:
    for table in tables:
        console.print(table.rich())
    for finding in found:
        heading = f"[bold]{escape_markup(finding.bar)}: {finding.verdict}.[/bold] " if finding.verdict else ""
        console.print(f"- {heading}{escape_markup(finding.sentence)}", highlight=False)


def _beside(paths: Sequence[Path]) -> Path:
    # Of the parents: of a directory and one below it that would be the former, whose own page it is not.
    return Path(os.path.commonpath([path.resolve().parent for path in paths]))


def _write(page: Path, text: str) -> None:
    page.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(page) as file:
        file.write(text.encode())


def directory_argument(module: str) -> Path:
    """The one argument of the command `python -m module`."""
    if len(sys.argv) != 2:
        raise UserError(f"name the directory of a study: python -m {module} outputs/batch_size_invariance")
    return Path(sys.argv[1])


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", type=Path, metavar="PATH", help="directories of runs, sweeps or a study")
    help_of_output = f"the page; by default {FILE} in the one PATH, or in the directory that several PATHs lie in"
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help=help_of_output)
    return parser


def main() -> None:
    arguments = parser().parse_args()
    paths: list[Path] = arguments.paths
    with command_line():
        if not paths:
            raise UserError(
                "name the directory of a run, a sweep or a study: python -m experiments.report outputs/demo"
            )
        if len(paths) == 1 and (paths[0] / description.FILE).exists():
            remake(paths[0], Console(), arguments.output)
        else:
            of_runs(paths, Console(), arguments.output)


if __name__ == "__main__":
    main()
