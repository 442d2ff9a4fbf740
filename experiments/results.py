"""Runs the studies, and writes what they found into experiments/RESULTS.md; no number in it is typed.

python -m experiments.results                      all of them, in full: hours; what is finished is not run again
python -m experiments.results --short              their short forms, minutes each
python -m experiments.results drift temperature    these two
python -m experiments.results --collect            nothing is run: what outputs/ has is written

The full form of an experiment wins over its short form where both are finished. What is written is kept in
docs/results/ too, from where the sections of experiments without results in outputs/ are written again.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from experiments import report
from experiments.catalogue import Experiment, catalogue, chosen
from experiments.description import OUTCOME
from experiments.documents import Cell, Table, fill_document, markdown
from experiments.errors import UserError, command_line
from experiments.estimate import Finding, count
from experiments.recorded import CORES, FOLDER, UNKNOWN, Recorded, duration, figure_of, finished, recorded

RESULTS = Path("experiments/RESULTS.md")
MARKER = "results"


def run(experiments: Sequence[Experiment]) -> list[str]:
    """One after the other, each with all cores; the names of those that failed, whose own messages said why."""
    failed = []
    for i, experiment in enumerate(experiments, 1):
        print(f"[{i}/{len(experiments)}] {experiment.name}", file=sys.stderr)
        if subprocess.run([sys.executable, *experiment.arguments]).returncode:
            failed.append(experiment.name)
    return failed


def record(experiments: Sequence[Experiment]) -> list[str]:
    """Keeps what is finished, of a short form beside a full one its time alone; the names of the rest."""
    rest = []
    for experiment in experiments:
        anew(experiment)
        found, kept = finished(experiment), recorded(experiment.name)
        if found is None:
            rest.append(experiment.name)
        elif found.form == "short" and kept is not None and kept.form == "full":
            replace(kept, short_seconds=found.summary.seconds).save(experiment.name)
        else:
            earlier = None if kept is None else kept.seconds_of("short")
            if found.form == "full" and found.short_seconds is None and earlier is not None:
                found = replace(found, short_seconds=CORES * earlier)
            found.save(experiment.name, figure_of(experiment, found.form))
    return rest


def anew(experiment: Experiment) -> None:
    """Findings by the code of today, from results that may be older."""
    for one in (experiment, experiment.short):
        if one is not None and (one.directory / OUTCOME).exists():
            report.remake(one.directory, Console(quiet=True))


def document(experiments: Sequence[Experiment]) -> str:
    """The table of all, and a section for each that has been recorded."""
    known = {experiment.name: recorded(experiment.name) for experiment in experiments}
    sections = [section(name, found) for name, found in known.items() if found is not None]
    return "\n\n".join([summary_of(known), *sections])


def summary_of(known: dict[str, Recorded | None]) -> str:
    rows = [row(name, found) for name, found in known.items()]
    explanation = (
        "Claims as the sections state them, judged by intervals over seeds. A short form says less than the full one. "
        f"Times are the sum of all jobs' processor time over {CORES}, of wall-clock time in results from before it was "
        "counted."
    )
    columns = ["experiment", "claims", "seeds", "form", f"time on {CORES} cores", "of the short form"]
    return markdown(Table("All studies", explanation, columns, rows, emphasised=()))


def row(name: str, found: Recorded | None) -> list[Cell]:
    if found is None:
        return [name, UNKNOWN, "", "", "", ""]
    return [
        f"[{name}](#{name})",
        count(found.summary.findings),
        str(found.seeds),
        found.form,
        duration(found.seconds),
        duration(found.seconds_of("short")),
    ]


def section(name: str, found: Recorded) -> str:
    summary = found.summary
    picture = f"![{line(summary.alternative)}](../{FOLDER}/{name}.png)"
    versions = ", ".join(f"{key} {value}" for key, value in summary.environment.items())
    seconds = f"{duration(summary.seconds)} of computing, about {duration(found.seconds)} on {CORES} cores"
    parts = [
        f"## {name}",
        f"**{summary.title}.** {line(summary.question)}",
        f"Tested: {line(summary.source)}.",
        f"`{summary.command}`: {summary.jobs} jobs over {found.seeds} seeds, {seconds}; {versions}.",
        f"> {line(summary.note)}" if summary.note else "",
        picture,
        f"*{line(summary.caption)}*",
        "\n".join(map(sentence, summary.findings)),
    ]
    return "\n\n".join(part for part in parts if part)


def sentence(finding: Finding) -> str:
    if finding.verdict is None:
        return f"- {line(finding.sentence)}"
    return f"- {line(finding.bar)}: **{finding.verdict}**. {line(finding.sentence)}"


def line(text: str) -> str:
    """As one line, whose signs Markdown leaves alone."""
    joined = " ".join(text.split())
    return re.sub(r"([*_~])", r"\\\1", joined).replace("<", "&lt;")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="of studies: python -m experiments.list")
    parser.add_argument("--short", action="store_true", help="run the short forms")
    parser.add_argument("--collect", action="store_true", help="run nothing, write what is there")
    arguments = parser.parse_args()
    with command_line("interrupted: what is finished is kept, and the same command continues"):
        wanted = chosen(arguments.names)
        if not RESULTS.exists():
            raise UserError(f"there is no {RESULTS} here: run this at the top of the project")
        failed = [] if arguments.collect else run([e.short or e if arguments.short else e for e in wanted])
        rest = record(wanted)
        fill_document(RESULTS, MARKER, document([e for e in catalogue() if e.config.study]))
        print(f"written: {RESULTS}, {FOLDER}; of {len(wanted)} studies, {len(rest)} without results", file=sys.stderr)
        if failed:
            raise UserError(f"{', '.join(failed)} failed, with the message above; the same command runs the rest again")


if __name__ == "__main__":
    main()
