"""Search for the values that reach the lowest loss: trial after trial, hopeless ones broken off, none of them lost.

python -m experiments.search experiment=search_digits
python -m experiments.search experiment=digits search=learning_rate optimizer=adam directory=outputs/adam

A trial is an ordinary run of experiments.train for every seed, in runs/ of the directory, and the same command goes on
with a search that was interrupted or killed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import hydra
import numpy as np
import optuna
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from optuna.trial import TrialState
from rich.console import Console

from experiments import record
from experiments.config import CONF, as_config
from experiments.distributed import refuse_processes, this_process
from experiments.errors import Diverged, UserError, command_line
from experiments.jobs import Training, training
from experiments.progress import Notify, note, progress_line
from experiments.record import Record
from experiments.report import show
from experiments.schedule import evaluation_counts
from experiments.schemas.run import Config, SearchConfig, Searched
from experiments.search_results import (
    Confirmation,
    Trial,
    command_of_best,
    importances,
    outcome,
    ranked,
    read,
)
from experiments.study import Outcome
from experiments.tracker import Tracker, open_summary, track_outcome
from experiments.train import train
from experiments.trials import (
    NOTE,
    REFUSED,
    Value,
    alone,
    as_overrides,
    ask,
    asked,
    compose_overrides,
    given_values,
    open_trials,
    read_search,
    values_of,
)


def run_search(config: Config, directory: Path, overrides: Sequence[str]) -> None:
    """Trials until there are search.trials of them; then table, figure and the command of the best one.

    overrides: those that the configuration was composed with, to which each trial adds its own. Raises UserError for a
    search that cannot be, and if no trial comes to its end.
    """
    refuse_processes("a search")
    console = Console()
    search = read_search(config)
    group = config.tracker.group or f"{config.name} search"
    config = dataclasses.replace(config, tracker=dataclasses.replace(config.tracker, group=group))
    with alone(directory):
        study = open_trials(config, search, directory)
        try:
            make_trials(study, config, search, directory, overrides, console)
            trials = read(study)
            confirmed = confirm(trials, config, search, directory, overrides, console)
        except KeyboardInterrupt:
            console.print(
                f"interrupted: {len(asked(study))} trials are kept; with directory={directory} the command continues"
            )
            raise SystemExit(130) from None
        found = outcome(trials, search, confirmed, importances(study))
        finish(trials, found, config, directory, command_of_best(trials, overrides, search, directory), console)


def make_trials(
    study: optuna.Study,
    config: Config,
    search: SearchConfig,
    directory: Path,
    overrides: Sequence[str],
    console: Console,
) -> None:
    before = len(asked(study))
    todo = range(before, search.trials)
    console.print(f"{search.trials} trials in {directory}, {before} of them finished before", soft_wrap=True)
    if not todo:
        return
    given = given_values(config, search)
    with progress_line([f"trial {i}" for i in todo], [1.0] * len(todo), before, console) as board:
        for row, index in enumerate(todo):
            trial = ask(study, search, given)
            values = values_of(trial)
            try:
                run = config_of(index, values, config, overrides)
                loss = loss_of(trial, run, search, directory, partial(note, board, row))
            except optuna.TrialPruned:
                study.tell(trial, state=TrialState.PRUNED)
            except UserError as error:
                # Some combinations cannot be, as groups that do not divide channels: each counts as a trial, once.
                trial.set_user_attr(REFUSED, str(error))
                study.tell(trial, state=TrialState.FAIL)
                console.print(
                    f"trial {index}, {' '.join(as_overrides(values))}, is refused: {error}",
                    soft_wrap=True,
                    markup=False,
                )
            else:
                study.tell(trial, loss)
            found = trial.user_attrs.get(NOTE, {"examples": 1, "losses": [float("nan")]})
            note(board, row, found["examples"], found["examples"], found["losses"][-1])


def config_of(index: int, values: dict[str, Value], config: Config, overrides: Sequence[str]) -> Config:
    """Raises UserError if the configuration cannot be composed with these values."""
    composed = compose_overrides([*overrides, *as_overrides(values)])
    tags = [*config.tracker.tags, f"trial {index}"]
    return dataclasses.replace(
        composed, search=None, tracker=dataclasses.replace(config.tracker, job_type="trial", tags=tags)
    )


def loss_of(trial: optuna.Trial, config: Config, search: SearchConfig, directory: Path, tell: Notify) -> float:
    """The final loss in nats, the mean over the seeds. Raises optuna.TrialPruned if the first seed falls behind."""
    losses: list[float] = []
    examples, diverged = 0, False
    for i, job in enumerate(jobs_of(config, search.seeds, directory)):

        def watch(seen: int, total: int, loss: float, i: int = i) -> None:
            tell(i * total + seen, len(search.seeds) * total, loss)
            if i == 0:
                prune(trial, config, search, seen, total, loss)

        result = finished_run(job, watch)
        losses.append(final_loss(result, search))
        examples += result.examples[-1]
        diverged |= result.status == "diverged"
    trial.set_user_attr(NOTE, {"losses": losses, "examples": examples, "diverged": diverged})
    return sum(losses) / len(losses)


def jobs_of(config: Config, seeds: Sequence[int], directory: Path) -> list[Training]:
    return [training(directory / "runs", dataclasses.replace(config, seed=seed)) for seed in seeds]


def final_loss(result: Record, search: SearchConfig) -> float:
    """Raises UserError if not even the initial model has one."""
    if not result.examples:
        raise UserError("the loss of the initial model is not finite")
    return result.final_test_loss if search.loss is Searched.test else result.final_train_loss


def prune(trial: optuna.Trial, config: Config, search: SearchConfig, seen: int, total: int, loss: float) -> None:
    """Where a run is evaluated, after its warm-up; and not for the test loss, since runs tell their training loss."""
    evaluations = evaluation_counts(total, config.evaluation.multiple, config.evaluation.count)
    if search.loss is Searched.test or seen not in evaluations:
        return
    trial.report(loss, seen)
    judged = max(search.prune_after * total, config.train.warmup_examples)
    if judged <= seen < total and trial.should_prune():
        trial.set_user_attr(NOTE, {"losses": [loss], "examples": seen, "diverged": False})
        raise optuna.TrialPruned


def finished_run(job: Training, watch: Notify) -> Record:
    """The record of a run: found, or made."""
    if not job.is_finished():
        with suppress(Diverged):
            return train(job.config, job.directory, watch)
    return Record.load(job.directory / record.FILE)


def confirm(
    trials: Sequence[Trial],
    config: Config,
    search: SearchConfig,
    directory: Path,
    overrides: Sequence[str],
    console: Console,
) -> Confirmation | None:
    """The best trial and the first one on seeds that chose neither; None if they are one, or if the first has no end or
    is not the configuration as it was given."""
    best, given = ranked(trials)[0], trials[0]
    if best is given or not given.given or given.state != "finished":
        return None
    jobs = [
        job
        for trial in (best, given)
        for job in jobs_of(config_of(trial.number, trial.values, config, overrides), search.confirm_seeds, directory)
    ]
    losses = []
    with progress_line([job.directory.name for job in jobs], [1.0] * len(jobs), 0, console) as board:
        for i, job in enumerate(jobs):
            losses.append(final_loss(finished_run(job, partial(note, board, i)), search))
            note(board, i, 1, 1, losses[-1])
    return Confirmation(*np.array(losses).reshape(2, -1))


def finish(
    trials: Sequence[Trial], found: Outcome, config: Config, directory: Path, command: str, console: Console
) -> None:
    """Figures, the terminal, and one tracked run of the whole."""
    figure = found.write_figure(directory)
    show(found.tables, found.findings, console)
    console.print(f"figure: {figure}, {figure.with_suffix('.svg')}", soft_wrap=True)
    console.print("the best again, to keep its checkpoint:", command, soft_wrap=True, markup=False, highlight=False)
    with open_summary(config, directory) as run:
        track(run, trials, command)
        track_outcome(run, found.tables, found.findings, figure)


def track(run: Tracker, trials: Sequence[Trial], command: str) -> None:
    """Loss by trial, against the examples that all trials up to it took together."""
    examples, best = 0, float("inf")
    for trial in trials:
        examples += trial.examples
        best = min(best, trial.loss) if trial.state == "finished" else best
        run.log(examples, {"search/trial": trial.number, "search/loss": trial.loss, "search/best": best})
    run.summarize({"search/best": best, "search/trials": len(trials), "search/command": command})


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def main(composed: DictConfig) -> None:
    job = HydraConfig.get()
    with command_line(), this_process().one_message():
        run_search(as_config(composed), Path(job.runtime.output_dir), job.overrides.task)


if __name__ == "__main__":
    main()
