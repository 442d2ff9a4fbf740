"""Tables, figure and a self-contained report.html from the records of a study.

python -m experiments.report DIRECTORY
"""

from __future__ import annotations

import base64
import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from importlib import metadata
from pathlib import Path
from string import Template
from typing import Any

import torch
from omegaconf import OmegaConf
from rich.console import Console
from rich.markup import escape as escape_markup

from experiments import figure, record
from experiments.atomic import atomic_write
from experiments.documents import Cell, Table
from experiments.errors import UserError, command_line
from experiments.findings import Finding, findings
from experiments.invariance import Analysis, Comparison, analyse
from experiments.record import Record
from experiments.tables import tables

FILE = "study.json"
TEMPLATE = Path(__file__).with_suffix(".html")
PACKAGES = ("gradstats", "torch", "numpy", "hydra-core", "wandb")


@dataclass
class Description:
    """What the records themselves do not say: which belong to the study, and what they were made with."""

    config: dict[str, Any]
    runs: list[str]
    command: str
    environment: dict[str, str]

    def save(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        with atomic_write(directory / FILE) as file:
            file.write(json.dumps(asdict(self), indent=1).encode())

    @classmethod
    def load(cls, directory: Path) -> Description:
        try:
            return cls(**json.loads((directory / FILE).read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(
                f"{directory} is not the directory of a study ({error}): name one that holds {FILE}"
            ) from error


@dataclass(frozen=True)
class Outcome:
    analysis: Analysis
    tables: list[Table]
    findings: list[Finding]
    figure: Path


def environment(threads: int) -> dict[str, str]:
    """What the numbers may depend on besides the configuration."""
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "threads per run": str(threads),
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed as a package"


def remake(directory: Path, console: Console) -> Outcome:
    """Analyse the records, write figure.png, figure.svg and report.html, and print the summary."""
    description = Description.load(directory)
    study = description.config["study"]
    records = [Record.load(directory / run / record.FILE) for run in description.runs]
    comparison = Comparison(
        ours=tuple(study["ours"]),
        reference=study["reference"],
        tuning_batch_size=study["tuning_batch_size"],
        score_batch_sizes=tuple(study["score_batch_sizes"]),
    )
    try:
        analysis = analyse(records, comparison)
    except ValueError as error:
        raise UserError(f"{directory}: {error}") from error
    outcome = Outcome(analysis, tables(analysis), findings(analysis), directory / "figure.png")
    light = figure.image(figure.draw(analysis), "svg")
    dark = figure.image(figure.draw(analysis, figure.DARK), "svg")
    outcome.figure.write_bytes(figure.image(figure.draw(analysis), "png"))
    (directory / "figure.svg").write_bytes(light)
    seconds = sum(run.seconds for run in records)
    (directory / "report.html").write_text(
        page(outcome, description, directory, light, dark, seconds), encoding="utf-8"
    )

    console.print(outcome.tables[0].rich())
    for finding in outcome.findings:
        heading = f"[bold]{finding.bar}: {finding.verdict}.[/bold] " if finding.verdict else ""
        console.print(f"- {heading}{escape_markup(finding.sentence)}", highlight=False)
    console.print(
        f"report: {directory / 'report.html'}    figure: {outcome.figure}, {directory / 'figure.svg'}", soft_wrap=True
    )
    return outcome


def page(outcome: Outcome, description: Description, directory: Path, light: bytes, dark: bytes, seconds: float) -> str:
    """The report as one HTML document without external resources."""
    grid, study = outcome.analysis.grid, description.config["study"]
    note = f'<p class="note">{escape(study["note"])}</p>' if study["note"] else ""
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title="Batch-size invariance",
        note=note,
        tuning_batch_size=study["tuning_batch_size"],
        batch_sizes=", ".join(map(str, grid.batch_sizes)),
        score_batch_sizes=", ".join(map(str, study["score_batch_sizes"])),
        findings="\n".join(map(_finding, outcome.findings)),
        light_figure=base64.b64encode(light).decode(),
        dark_figure=base64.b64encode(dark).decode(),
        alternative=escape(_alternative(outcome.analysis)),
        tables="\n".join(map(_table, outcome.tables)),
        command=escape(description.command),
        directory=escape(str(directory)),
        environment="\n".join(
            f'<tr><th scope="row">{escape(key)}</th><td>{escape(value)}</td></tr>'
            for key, value in description.environment.items()
        ),
        configuration=escape(OmegaConf.to_yaml(OmegaConf.create(description.config))),
        runs=len(description.runs),
        seconds=f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{seconds:.0f} seconds",
    )


def _finding(finding: Finding) -> str:
    if finding.verdict is None:
        return f"<li>{escape(finding.sentence)}</li>"
    name = finding.verdict.replace(" ", "-")
    verdict = f'<strong>{escape(finding.bar)}: <span class="{name}">{finding.verdict}</span></strong>'
    return f"<li>{verdict} {escape(finding.sentence)}</li>"


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in table.columns)
    body = "\n".join(
        f'<tr class="ours">{_row(row)}</tr>' if i in table.emphasised else f"<tr>{_row(row)}</tr>"
        for i, row in enumerate(table.rows)
    )
    return (
        f"<h3>{escape(table.title)}</h3>\n"
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(table.title)}">\n'
        f"<table><caption>{escape(table.explanation)}</caption>\n"
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def _row(row: Sequence[Cell]) -> str:
    return f'<th scope="row">{escape(str(row[0]))}</th>' + "".join(f"<td>{_cell(cell)}</td>" for cell in row[1:])


def _cell(cell: Cell) -> str:
    if isinstance(cell, str):
        return f'<span class="value">{escape(cell)}</span>'
    interval = f' <span class="interval">[{cell.interval()}]</span>' if cell.text() != "–" else ""
    return f'<span class="value">{cell.text()}</span>{interval}'


def _alternative(analysis: Analysis) -> str:
    """The figure in words."""
    scores = "; ".join(
        f"{label}: score {score:.2g}, mean transfer regret {regret:.2g}"
        for label, score, regret in zip(
            analysis.grid.labels, analysis.point.score, analysis.point.mean_regret, strict=True
        )
    )
    return (
        f"Learning curves over batch sizes, score against final loss, and transfer regret over batch sizes. {scores}."
    )


def directory_argument(module: str) -> Path:
    """The one argument of the command `python -m module`."""
    if len(sys.argv) != 2:
        raise UserError(f"name the directory of a study: python -m {module} outputs/batch_size_invariance")
    return Path(sys.argv[1])


def main() -> None:
    with command_line():
        remake(directory_argument("experiments.report"), Console())


if __name__ == "__main__":
    main()
