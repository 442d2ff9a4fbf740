"""Every experiment: its question, how long it takes on 2 cores, what it found last, and its command.

python -m experiments.list                                     in the terminal, with what outputs/ has
python -m experiments.list --markdown docs/experiments.md      between the markers of a document, from docs/results/

Times are those of recorded results: the sum of all jobs' processor time over the number of cores.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import rich.box
from rich.console import Console
from rich.markup import escape
from rich.table import Table as Grid

from experiments import documents, record
from experiments.catalogue import SHORT, Experiment, catalogue
from experiments.errors import command_line
from experiments.estimate import Finding, count
from experiments.record import Record
from experiments.recorded import UNKNOWN, Form, duration, finished, recorded

MARKER = "experiments"
HOW = "python -m experiments.train experiment=NAME, short form experiment=short/NAME"


@dataclass(frozen=True)
class Line:
    """What is told of one experiment; full and short are times, or that it has not run."""

    experiment: Experiment
    full: str
    short: str
    finding: str


def lines(experiments: Sequence[Experiment], local: bool) -> list[Line]:
    """local: with what outputs/ holds, and not only with what docs/results/ has recorded."""
    return [of_study(e, local) if e.config.study else of_run(e, local) for e in experiments]


def of_study(experiment: Experiment, local: bool) -> Line:
    here = finished(experiment) if local else None
    known = [found for found in (here, recorded(experiment.name)) if found is not None]
    latest = next((found for found in known if found.form == "full"), known[0] if known else None)

    def time_of(form: Form) -> str:
        seconds = next((s for found in known if (s := found.seconds_of(form)) is not None), None)
        return UNKNOWN if seconds is None and (form == "full" or not known) else duration(seconds)

    return Line(
        experiment,
        full=time_of("full"),
        short=time_of("short") if experiment.short else "",
        finding=last_finding(latest.summary.findings) if latest else "",
    )


def of_run(experiment: Experiment, local: bool) -> Line:
    """Of the newest of its runs that came to their end."""
    paths = sorted(experiment.directory.glob(f"*/{record.FILE}"), key=lambda path: path.stat().st_mtime)
    ended = [found for found in map(Record.load, paths if local else []) if found.status == "finished"]
    if not ended:
        return Line(experiment, UNKNOWN if local else "", "", "")
    last = ended[-1]
    losses = f"training loss {last.final_train_loss:.4f}, test loss {last.final_test_loss:.4f}, {last.label}"
    return Line(experiment, duration(last.seconds), "", losses)


def last_finding(findings: Sequence[Finding]) -> str:
    """The first claim, which is the main one, and how many of them hold."""
    claims = [finding for finding in findings if finding.verdict]
    if not claims:
        return findings[0].sentence if findings else ""
    rest = f" ({count(findings)})" if len(claims) > 1 else ""
    return f"{claims[0].bar}: {claims[0].verdict}{rest}"


def grid(found: Sequence[Line]) -> Grid:
    table = Grid(box=rich.box.SIMPLE_HEAD, padding=(0, 1, 1, 0))
    table.add_column("experiment", no_wrap=True)
    table.add_column("question, and last finding", ratio=1)
    table.add_column("on 2 cores", no_wrap=True)
    for line in found:
        told = escape(line.experiment.question()) + (f"\n[dim]{escape(line.finding)}[/dim]" if line.finding else "")
        time = line.full + (f"\n[dim]short: {line.short}[/dim]" if line.experiment.short else "")
        table.add_row(names_of(line, "\n[dim]short: ", "[/dim]"), told, time)
    return table


def names_of(line: Line, before: str, after: str) -> str:
    """The experiment's, and that of a short form that is not called like it."""
    name, short = line.experiment.name, line.experiment.short
    return name if short is None or short.name == f"{SHORT}{name}" else f"{name}{before}{short.name}{after}"


def markdown(found: Sequence[Line]) -> str:
    rows: list[list[documents.Cell]] = [
        [
            f"`{names_of(line, '`, short `', '')}`",
            cell(line.experiment.question()),
            line.full,
            line.short,
            cell(line.finding),
        ]
        for line in found
    ]
    columns = ["experiment", "question", "on 2 cores", "short form", "last finding"]
    return documents.markdown(documents.Table("All experiments", f"{HOW}.", columns, rows, emphasised=()))


def cell(text: str) -> str:
    """What ends no cell of a table."""
    return text.replace("|", r"\|").replace("_", r"\_").replace("<", "&lt;")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--markdown",
        nargs="?",
        type=Path,
        const=sys.stdout,
        metavar="DOCUMENT",
        help="as a document has it, from docs/results/ alone: printed, or written between the markers of the document",
    )
    arguments = parser.parse_args()
    with command_line():
        if arguments.markdown is None:
            Console().print(grid(lines(catalogue(), local=True)))
            print(HOW)
        elif arguments.markdown is sys.stdout:
            print(markdown(lines(catalogue(), local=False)))
        else:
            documents.fill_document(arguments.markdown, MARKER, markdown(lines(catalogue(), local=False)))


if __name__ == "__main__":
    main()
