"""Where measurements go: Weights & Biases, or nowhere. Nothing that happens here stops a run.

Every chart is against examples_seen, never against W&B's own step, which begins again in a run that is resumed offline.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

from experiments.config import Config, TrackerMode, as_dict
from experiments.errors import choose

AXIS = "examples_seen"


@dataclass(frozen=True)
class Histogram:
    counts: list[float]  # (bins,)
    edges: list[float]  # (bins + 1,)


Value = float | str | Histogram


class Tracker:
    """Keeps nothing. run_id names the run in a tracker that does, for a checkpoint to continue it."""

    run_id: str | None = None

    def log(self, examples_seen: int, values: Mapping[str, Value]) -> None:
        pass

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[float | str]]) -> None:
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

    def log(self, examples_seen: int, values: Mapping[str, Value]) -> None:
        self._attempt(lambda: self._run and self._run.log({AXIS: examples_seen} | self._converted(values)))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[float | str]]) -> None:
        self._attempt(
            lambda: self._run and self._run.log({name: self._wandb.Table(list(columns), [list(row) for row in rows])})
        )

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


TRACKERS: dict[str, Callable[[Config, Path, str | None], Tracker]] = {
    "wandb": WandbTracker,
    "none": lambda config, directory, run_id: Tracker(),
}


def open_tracker(config: Config, directory: Path, run_id: str | None = None) -> Tracker:
    """The tracker of the configuration, to be used in a `with`; run_id continues a run."""
    return choose(TRACKERS, config.tracker.name, "tracker.name")(config, directory, run_id)


def how_to_look(directory: Path) -> str | None:
    """What to type to see the charts of the run in a directory; None if it has none."""
    folder = directory / "wandb"
    if not folder.exists():
        return None
    look = f"charts in the terminal: wandb leet {folder}"
    offline = any(folder.glob("offline-run-*"))
    return f"{look}\ncharts in a browser, with an account: wandb sync {folder}/offline-run-*" if offline else look
