"""A grid of training runs: methods, learning rates, batch sizes, seeds; in parallel, and continued where it stopped."""

from __future__ import annotations

import dataclasses
import shlex
import time
from pathlib import Path

import joblib
from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import MissingConfigException
from rich.console import Console

from experiments import record, report
from experiments.config import Config, OptimizerConfig, StudyConfig, as_config, as_dict, compose_config, fingerprint
from experiments.errors import Diverged, UserError
from experiments.progress import note, progress_line
from experiments.tracker import open_tracker
from experiments.train import train


def run_study(config: Config, directory: Path) -> None:
    """Run what has no record yet, then write tables, figure and report to the directory.

    A diverged run is a result like any other. Interrupting loses the unfinished runs only.
    """
    console = Console()
    study = read_study(config)
    group = f"{config.name} {time.strftime('%Y-%m-%d %H:%M:%S')}"
    runs = plan(config, study, directory, group)
    describe(config, directory, runs)
    todo = sorted((run for run in runs if not is_finished(run)), key=cost, reverse=True)
    if study.note:
        console.print(study.note)
    console.print(f"{len(runs)} runs in {directory}, {len(runs) - len(todo)} of them finished before", soft_wrap=True)
    names = [f"{run.optimizer.name} B={run.train.batch_size}" for run in todo]
    workers = joblib.Parallel(study.workers or joblib.cpu_count(), batch_size=1, return_as="generator_unordered")
    try:
        if todo:
            with progress_line(names, [cost(run) for run in todo], len(runs) - len(todo), console) as board:
                for _ in workers(joblib.delayed(run_one)(board, i, run) for i, run in enumerate(todo)):
                    pass
    except KeyboardInterrupt:
        kept = sum(map(is_finished, runs))
        console.print(f"interrupted: {kept} of {len(runs)} runs are kept, and the same command continues")
        raise SystemExit(130) from None
    outcome = report.remake(directory, console)
    track_summary(config, directory, group, outcome)
    if config.tracker.name != "none":
        folders = [folder / "wandb" / "offline-run-*" for folder in (directory, directory / "runs" / "*")]
        console.print(f"summary in the terminal: wandb leet {directory / 'wandb'}", soft_wrap=True)
        console.print(f"charts in a browser, with an account: wandb sync {folders[0]} {folders[1]}", soft_wrap=True)


def describe(config: Config, directory: Path, runs: list[Config]) -> None:
    """Note beside the records what they belong to, so that the report can be made again from them alone."""
    overrides = HydraConfig.get().overrides.task if HydraConfig.initialized() else [f"experiment={config.name}"]
    report.Description(
        config=as_dict(config),
        runs=[str(Path(run.directory).relative_to(directory)) for run in runs],
        command=shlex.join(["python", "-m", "experiments.train", *overrides]),
        environment=report.environment(config.hardware.threads),
    ).save(directory)


def track_summary(config: Config, directory: Path, group: str, outcome: report.Outcome) -> None:
    """One tracked run that holds the tables, the findings and the figure of the study."""
    tracker = dataclasses.replace(config.tracker, group=group, job_type="summary", tags=[config.name, "summary"])
    summary = dataclasses.replace(config, name=f"{config.name}-summary", tracker=tracker)
    with open_tracker(summary, directory) as run:
        for table in outcome.tables:
            run.table(table.title, table.columns, [list(map(str, row)) for row in table.rows])
        run.table(
            "Findings",
            ["bar", "verdict", "sentence"],
            [[finding.bar, finding.verdict or "", finding.sentence] for finding in outcome.findings],
        )
        run.image("Figure", outcome.figure)


def read_study(config: Config) -> StudyConfig:
    """The study of the configuration, if its values fit each other. Raises UserError if they do not."""
    study = config.study
    if study is None:
        raise UserError("study=null: choose an experiment that has one, as experiment=batch_size_invariance")
    methods = [*study.ours, *study.baselines]
    for key, values in (
        ("ours", study.ours),
        ("baselines", study.baselines),
        ("ours and study.baselines", methods),
        ("lr_multipliers", study.lr_multipliers),
        ("batch_sizes", study.batch_sizes),
        ("seeds", study.seeds),
    ):
        if not values or len(set(values)) < len(values):
            raise UserError(f"study.{key}: {values} must have one value or more, each of them once")
    for key, subset, whole in (
        ("score_batch_sizes", study.score_batch_sizes, study.batch_sizes),
        ("tuning_batch_size", [study.tuning_batch_size], study.batch_sizes),
        ("reference", [study.reference], study.baselines),
    ):
        if strangers := [value for value in subset if value not in whole]:
            raise UserError(f"study.{key} has {strangers}, which the study does not run: choose among {whole}")
    if len(study.score_batch_sizes) < 2:
        raise UserError(f"study.score_batch_sizes has {study.score_batch_sizes}: a score needs two batch sizes or more")
    return study


def plan(config: Config, study: StudyConfig, directory: Path, group: str) -> list[Config]:
    """The configuration of every run; all methods share data, model, budget and schedule."""
    runs = []
    for method in [*study.ours, *study.baselines]:
        optimizer = default_optimizer(method)
        for multiplier in study.lr_multipliers:
            for batch_size in study.batch_sizes:
                for seed in study.seeds:
                    run = dataclasses.replace(
                        config,
                        study=None,
                        resume=True,
                        seed=seed,
                        optimizer=dataclasses.replace(
                            optimizer, lr=optimizer.lr * multiplier, batch_size=study.tuning_batch_size
                        ),
                        train=dataclasses.replace(config.train, batch_size=batch_size),
                        tracker=dataclasses.replace(
                            config.tracker, group=group, job_type=method, tags=[config.name, method, f"B={batch_size}"]
                        ),
                    )
                    run.name = f"{method}-B{batch_size}-lr{run.optimizer.lr:g}-seed{seed}"
                    # The fingerprint keeps runs of another configuration in the same study directory apart.
                    run.directory = str(directory / "runs" / f"{run.name}-{fingerprint(run)[:8]}")
                    runs.append(run)
    return runs


def default_optimizer(method: str) -> OptimizerConfig:
    """A member of the group `optimizer`, with its own default values."""
    overrides = [f"optimizer={method}"]
    try:
        # Hydra composes once a process, or through the application that is already running.
        if GlobalHydra.instance().is_initialized():
            return as_config(compose("config", overrides)).optimizer
        return compose_config(overrides).optimizer
    except MissingConfigException as error:
        raise UserError(f"study.ours and study.baselines must name optimizers: {error}") from error


def is_finished(run: Config) -> bool:
    """Also a diverged run, which is not given another try."""
    return (Path(run.directory) / record.FILE).exists()


def cost(run: Config) -> float:
    """Time of a run, relative to others of the study: its steps, and what each example costs at any batch size."""
    return 1 / run.train.batch_size + 1 / 64


def run_one(board: Path, index: int, run: Config) -> None:
    """In a worker process: train, and note how far it is."""
    try:
        train(run, Path(run.directory), lambda examples, total, loss: note(board, index, examples, total, loss))
    except Diverged:
        note(board, index, 1, 1, float("nan"))
