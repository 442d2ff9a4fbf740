"""Where measurements go: Weights & Biases, or nowhere. Nothing that happens here stops a run.

Every chart is against examples_seen, never against W&B's own step, which begins again in a run that is resumed offline.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from experiments.documents import Table
from experiments.errors import choose
from experiments.estimate import Finding
from experiments.fingerprint import as_dict
from experiments.record import Record
from experiments.schemas.run import Config, TrackerMode

AXIS = "examples_seen"
# What W&B keeps of a chart beside its last value, while the run lasts: the extreme that is the better one.
BETTER = {"loss/train": "min", "loss/test": "min", "accuracy/train": "max", "accuracy/test": "max"}


@dataclass(frozen=True)
class Histogram:
    counts: list[float]  # (bins,)
    edges: list[float]  # (bins + 1,)


@dataclass(frozen=True)
class Picture:
    pixels: NDArray[np.uint8]  # (height, width), grey, or (height, width, 3)


Value = float | str | Histogram
Cell = float | str | Picture


class Tracker:
    """Keeps nothing. run_id names the run in a tracker that does, for a checkpoint to continue it."""

    run_id: str | None = None

    def log(self, examples_seen: int, values: Mapping[str, Value]) -> None:
        pass

    def summarize(self, values: Mapping[str, float | str]) -> None:
        pass

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        pass

    def image(self, name: str, path: Path) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        pass


class WandbTracker(Tracker):
    """A W&B run in directory/wandb.

    A failure is told on stderr: an online run that cannot start becomes an offline one, and a run that cannot be
    written to goes on untracked.
    """

    def __init__(self, config: Config, directory: Path, run_id: str | None) -> None:
        self.run_id = run_id
        self._run: Any = None
        if config.tracker.mode is TrackerMode.online:
            self._attempt(lambda: self._start(config, directory, "online"), "is tracked offline")
        if self._run is None:
            self._attempt(lambda: self._start(config, directory, "offline"))

    def _start(self, config: Config, directory: Path, mode: Literal["online", "offline"]) -> None:
        import wandb

        self._wandb = wandb
        self._run = wandb.init(
            project=config.tracker.project,
            name=config.name,
            group=config.tracker.group,
            job_type=config.tracker.job_type,
            tags=config.tracker.tags,
            config=as_dict(config),
            dir=directory,
            id=self.run_id,
            resume="allow",
            mode=mode,
            # Listing the installed packages takes longer than a short run's own logging.
            settings=wandb.Settings(silent=True, console="off", x_save_requirements=False),
        )
        self.run_id = self._run.id
        self._run.define_metric(AXIS)
        self._run.define_metric("*", step_metric=AXIS)
        for name, extreme in BETTER.items():
            self._run.define_metric(name, step_metric=AXIS, summary=f"{extreme},last")

    def log(self, examples_seen: int, values: Mapping[str, Value]) -> None:
        self._attempt(lambda: self._run and self._run.log({AXIS: examples_seen} | self._converted(values)))

    def summarize(self, values: Mapping[str, float | str]) -> None:
        self._attempt(lambda: self._run and self._run.summary.update(values))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        def log() -> None:
            if self._run:
                cells = [[self._wandb.Image(c.pixels) if isinstance(c, Picture) else c for c in row] for row in rows]
                self._run.log({name: self._wandb.Table(list(columns), cells)})

        self._attempt(log)

    def image(self, name: str, path: Path) -> None:
        self._attempt(lambda: self._run and self._run.log({name: self._wandb.Image(str(path))}))

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        self._attempt(lambda: self._run and self._run.finish(exit_code=int(kind is not None)))

    def _converted(self, values: Mapping[str, Value]) -> dict[str, Any]:
        return {
            name: self._wandb.Histogram(np_histogram=(np.array(value.counts), np.array(value.edges)))
            if isinstance(value, Histogram)
            else value
            for name, value in values.items()
        }

    def _attempt(self, action: Callable[[], Any], consequence: str = "goes on without it") -> None:
        try:
            action()
        except Exception as error:  # whatever it is: days of training are worth more than a chart
            self._run = None
            print(f"W&B failed, and this run {consequence}: {error}", file=sys.stderr)
            if isinstance(error, ConnectionError):
                # Its service is gone: the next run of this process is to start another, and nothing to wait for this.
                with suppress(Exception):
                    self._wandb.teardown()


TRACKERS: dict[str, Callable[[Config, Path, str | None], Tracker]] = {
    "wandb": WandbTracker,
    "none": lambda config, directory, run_id: Tracker(),
}


def open_tracker(config: Config, directory: Path, run_id: str | None = None) -> Tracker:
    """The tracker of the configuration, to be used in a `with`; run_id continues a run."""
    return choose(TRACKERS, config.tracker.name, "tracker.name")(config, directory, run_id)


def open_summary(config: Config, directory: Path) -> Tracker:
    """Of a study or a search as a whole, a run beside those that it consists of."""
    tracker = dataclasses.replace(config.tracker, job_type="summary", tags=[config.name, "summary"])
    return open_tracker(dataclasses.replace(config, name=f"{config.name}-summary", tracker=tracker), directory)


def track_outcome(run: Tracker, tables: Sequence[Table], findings: Sequence[Finding], figure: Path) -> None:
    for table in tables:
        run.table(table.title, table.columns, [list(map(str, row)) for row in table.rows])
    rows = [[finding.bar, finding.verdict or "", finding.sentence] for finding in findings]
    run.table("Findings", ["bar", "verdict", "sentence"], rows)
    run.image("Figure", figure)


def summary(result: Record, lr: float) -> dict[str, float | str]:
    """Of a run: how it ended, and what it reached. lr is that of a step at the run's batch size."""
    values: dict[str, float | str] = {"status": result.status, "seconds": result.seconds, "step_lr": lr}
    if result.examples:
        values |= {
            "examples": result.examples[-1],
            "final/loss/train": result.train_loss[-1],
            "final/loss/test": result.test_loss[-1],
            "final/accuracy/test": result.test_accuracy[-1],
            "best/loss/train": min(result.train_loss),
            "best/loss/test": min(result.test_loss),
            "best/accuracy/test": max(result.test_accuracy),
        }
    return values


@contextmanager
def summarized(tracker: Tracker, result: Record, lr: Callable[[], float]) -> Iterator[None]:
    """However the block ends, the tracker is given what the result holds then: that of all parts of a resumed run,
    where W&B's own minimum is that of the last one."""
    try:
        yield
    finally:
        tracker.summarize(summary(result, lr()))


def how_to_look(directory: Path) -> str | None:
    """What to type to see the charts of the run in a directory; None if it has none."""
    folder = directory / "wandb"
    if not folder.exists():
        return None
    look = f"charts in the terminal: wandb leet {folder}"
    offline = any(folder.glob("offline-run-*"))
    return f"{look}\ncharts in a browser, with an account: wandb sync {folder}/offline-run-*" if offline else look
