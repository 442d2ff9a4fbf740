"""Runs worth keeping, in docs/benchmark.json, and the pages that are written from them: never by hand."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from experiments.atomic import atomic_write
from experiments.benchmarks.report import Run, page, summary
from experiments.documents import fill_document
from experiments.errors import UserError

RECORD = Path("docs/benchmark.json")
PAGE = Path("docs/benchmark.md")
README = Path("README.md")


def load_run(path: Path) -> Run:
    try:
        return Run.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no benchmark.json of a run ({type(error).__name__}: {error})") from error


def append(run: Run) -> None:
    """Adds a run to the record. Raises: UserError for a quick one."""
    if run.about["quick"]:
        raise UserError("a quick run says nothing about prices: run without --quick to record")
    runs = [*records(), run]
    write(RECORD, json.dumps([r.to_json() for r in runs], indent=1) + "\n")


def records() -> list[Run]:
    return [Run.from_json(found) for found in json.loads(RECORD.read_text())] if RECORD.exists() else []


def write_pages() -> None:
    """docs/benchmark.md from the newest run of each kind of device, their figures, and the README's table from the
    newest on a CPU.

    Raises: UserError without a record, or without markers to write between."""
    found = records()
    newest = {kind_of(run): run for run in found}
    if not newest:
        raise UserError(f"nothing is recorded in {RECORD}: python -m experiments.benchmark --record")
    parts = []
    for kind, run in newest.items():
        figure = RECORD.with_name("_".join(["benchmark", *kind]).lower() + ".png")
        drawn = [f"![Time against memory]({figure.name})"] if draw(run, figure) or figure.exists() else []
        title = ", ".join(run.about[key] for key in ("processor", "instructions", "dtype") if key in run.about)
        parts.append("\n\n".join([f"## {title}", *drawn, page(run)]))
    fill_document(PAGE, "runs", "\n\n".join(parts))
    on_cpu = [run for run in found if kind_of(run)[0] == "cpu"]
    if on_cpu:
        fill_document(README, "price", summary(on_cpu[-1]))


def kind_of(run: Run) -> tuple[str, ...]:
    """The device, and the vector instructions of a CPU, on whose width the ratios depend."""
    device = str(run.about["device"]).partition(":")[0]
    return (device, run.about["instructions"]) if "instructions" in run.about else (device,)


def draw(run: Run, path: Path) -> bool:
    """Whether a figure was written: machines that only measure may lack matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from experiments.benchmarks import plot
    from experiments.themes import image

    with atomic_write(path) as file:
        file.write(image(plot.draw(run), "png"))
    return True


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(text.encode())
