"""From a study's configuration to its jobs, its report and its summary in W&B; continued where it stopped."""

from __future__ import annotations

import dataclasses
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from rich.console import Console

from experiments import laboratory, report
from experiments.description import OUTCOME, Description, environment, places
from experiments.distributed import refuse_processes
from experiments.errors import UserError
from experiments.fingerprint import as_dict
from experiments.jobs import Job, load, run_jobs
from experiments.schemas.run import Config
from experiments.study import Study
from experiments.tracker import open_summary, track_outcome

OF_ALL = ("experiment", "study", "name", "directory", "resume", "tracker")  # keys that any study may be given
UNTOLD = ("name", "note", "runs", "workers")  # settings that decide no number


def run_study(config: Config, directory: Path) -> None:
    """Run what has no result yet, then write tables, figure and report to the directory.

    Interrupting loses the unfinished jobs only.
    """
    refuse_processes("a study")
    console = Console()
    if (settings := config.study) is None:
        raise UserError("study=null: choose an experiment that has one, as experiment=batch_size_invariance")
    study = laboratory.load(settings)
    refuse_unread(study, overrides())
    group = f"{config.name} {time.strftime('%Y-%m-%d %H:%M:%S')}"
    config = dataclasses.replace(
        config, directory=str(directory), tracker=dataclasses.replace(config.tracker, group=group)
    )
    if settings.note:
        console.print(settings.note)
    try:
        finish(study, config, directory, console)
    except KeyboardInterrupt:
        console.print("interrupted: what is finished is kept, and the same command continues")
        raise SystemExit(130) from None
    outcome = report.remake(directory, console)
    with open_summary(config, directory) as run:
        track_outcome(run, outcome.tables, outcome.findings, outcome.figure)
    if config.tracker.name != "none":
        folders = [folder / "wandb" / "offline-run-*" for folder in (directory, study.root(config) / "*")]
        console.print(f"summary in the terminal: wandb leet {directory / 'wandb'}", soft_wrap=True)
        console.print(f"charts in a browser, with an account: wandb sync {folders[0]} {folders[1]}", soft_wrap=True)


def overrides() -> list[str]:
    """Of the command line; none where there is none."""
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def refuse_unread(study: Study[Any], given: Sequence[str]) -> None:
    """Raises UserError for an override that would change nothing."""
    for override in given:
        key = override.lstrip("+~").partition("=")[0]
        if not any(f"{key}.".startswith(f"{known}.") for known in (*OF_ALL, *study.reads)):
            own = ", ".join(f"study.{f.name}" for f in dataclasses.fields(study.settings) if f.name not in UNTOLD)
            raise UserError(
                f"{override}: {study.settings.name} does not read {key}, and has settings of its own: {own}. "
                f"Leave {key} away"
            )


def finish(study: Study[Any], config: Config, directory: Path, console: Console) -> None:
    """Round after round, until the results ask for no further job."""
    jobs: list[Job] = []
    while True:
        planned = study.jobs(config, [load(job.directory, job.coordinates) for job in jobs])
        if {job.directory for job in planned} == {job.directory for job in jobs}:
            return
        jobs = planned
        describe(config, directory, jobs)
        run_jobs(jobs, study.settings.workers, console)


def describe(config: Config, directory: Path, jobs: list[Job]) -> None:
    """Note beside the results what they belong to, so that the report can be made again from them alone.

    What was found before may belong to other settings, and goes.
    """
    (directory / OUTCOME).unlink(missing_ok=True)
    Description(
        config=as_dict(config),
        jobs=places(jobs, directory),
        command=shlex.join(["python", "-m", "experiments.train", *(overrides() or [f"experiment={config.name}"])]),
        environment=environment(config.hardware.threads),
    ).save(directory)
