"""The trials of a search in an SQLite file: what is tried, in which order, and what a killed search goes on with.

Every trial is drawn by a sampler with a seed of its own, from the trials before it: so a search that was killed draws
the trial that was running again, and after it those that it would have drawn.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from operator import attrgetter
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock, Timeout
from hydra.errors import HydraException
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState

from experiments.config import compose_config
from experiments.errors import UserError, check_distinct
from experiments.fingerprint import as_dict, first_difference, identity
from experiments.schemas.run import Config, Dimension, SearchConfig

FILE = "search.db"
LOCK = "search.lock"
# What a trial notes of itself: {"losses", "examples", "diverged"} at its end, or why it was refused.
NOTE, REFUSED = "note", "refused"
GIVEN = "given"  # of the first trial, if its values are those of the configuration
OVER = (TrialState.COMPLETE, TrialState.PRUNED)

Value = float | str


def read_search(config: Config) -> SearchConfig:
    """The search of the configuration, if its values fit each other. Raises UserError if they do not."""
    search = config.search
    if search is None:
        raise UserError("search=null: choose a space, as search=learning_rate, or an experiment that has one")
    if not search.space:
        raise UserError("search.space is empty: name a key and its values, as optimizer.lr: {low: 0.001, high: 0.1}")
    for key, dimension in search.space.items():
        check(key, dimension)
    if search.trials < 1 or search.startup < 1:
        raise UserError(f"search.trials={search.trials} and search.startup={search.startup} must be positive")
    check_distinct("search.seeds", search.seeds)
    confirm = search.confirm_seeds
    if len(set(confirm)) < max(2, len(confirm)) or set(confirm) & set(search.seeds):
        raise UserError(f"search.confirm_seeds: {confirm} must be two or more, each once, and none of search.seeds")
    if not 0 <= search.prune_after <= 1:
        raise UserError(f"search.prune_after={search.prune_after} is a share of the budget: give 0 to 1")
    return search


def check(key: str, dimension: Dimension) -> None:
    """Raises UserError for a dimension that is neither a range nor choices."""
    low, high = dimension.low, dimension.high
    if dimension.choices is not None and low is None and high is None:
        texts = [text(choice) for choice in dimension.choices]
        check_distinct(f"search.space: choices of {key}", texts)
    elif dimension.choices is not None or low is None or high is None:
        raise UserError(f"search.space: {key} needs either low and high, or choices")
    elif not low < high or (dimension.log and low <= 0):
        raise UserError(f"search.space: {key} from {low} to {high} is no range" + " for log" * dimension.log)


def text(choice: Any) -> str:
    """A choice as an override says it: Optuna stores strings, and lists only as such."""
    if isinstance(choice, list | tuple):
        return "[" + ",".join(map(text, choice)) + "]"
    return "null" if choice is None else str(choice)


def distribution(dimension: Dimension) -> BaseDistribution:
    if dimension.choices is not None:
        return CategoricalDistribution([text(choice) for choice in dimension.choices])
    assert dimension.low is not None and dimension.high is not None
    return FloatDistribution(dimension.low, dimension.high, log=dimension.log)


@contextmanager
def alone(directory: Path) -> Iterator[None]:
    """Raises UserError if another process searches in this directory. A lock of the dead is none."""
    directory.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(directory / LOCK, timeout=0):
            yield
    except Timeout:
        raise UserError(f"another search runs in {directory}: wait for it, or give another directory=") from None


def open_trials(config: Config, search: SearchConfig, directory: Path) -> optuna.Study:
    """The trials so far; one that was left running is marked as failed. Raises UserError if they are of another search.

    search.trials is no part of a search's identity, so that more of them continue it.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study(
            storage=f"sqlite:///{directory / FILE}",
            study_name="search",
            load_if_exists=True,
            # Percentiles of what others had at the same number of examples: the random ones have all of it.
            pruner=optuna.pruners.MedianPruner(n_startup_trials=search.startup),
        )
        stored = study.user_attrs.get("identity")
    except Exception as error:  # of SQLite, SQLAlchemy, Alembic or Optuna; none of them changes the way out
        first = str(error).partition("\n")[0]
        raise UserError(f"{directory / FILE} holds no search that can be read ({first}): move it away") from error
    now = identity_of(config)
    if stored is not None and (difference := first_difference(stored, now)) is not None:
        raise UserError(f"{directory} holds another search: {difference}. Go back to it, or give another directory=")
    study.set_user_attr("identity", now)
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)
    return study


def identity_of(config: Config) -> dict[str, Any]:
    search = as_dict(config)["search"]
    for key in ("trials", "confirm_seeds"):  # no trial depends on them
        del search[key]
    return identity(config) | {"search": search}


def asked(study: optuna.Study) -> list[FrozenTrial]:
    """All trials but those that a kill left running, which are drawn again."""
    trials = study.get_trials(deepcopy=False, states=(*OVER, TrialState.FAIL))
    return [trial for trial in trials if trial.state in OVER or REFUSED in trial.user_attrs]


def ask(study: optuna.Study, search: SearchConfig, given: dict[str, Value]) -> optuna.Trial:
    """The next trial, with its values drawn; the first is the configuration as it was given, if the space has it.

    Choices that were refused together are not tried again while there are others. The sampler, which learns nothing of
    a refusal, would draw them for being unknown.
    """
    index = len(asked(study))
    # Far apart, so that searches whose seeds are neighbours share no trial.
    seed = 1_000_003 * search.sampler_seed + index
    study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=search.startup)
    space = {key: distribution(dimension) for key, dimension in search.space.items()}
    first = index == 0 and all(contains(space[key], value) for key, value in given.items())
    if first and not study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
        study.enqueue_trial(given)
    trial = study.ask(space)
    left = allowed(study, search)
    if left and choices_of(trial, search) not in left:
        study.tell(trial, state=TrialState.FAIL)
        study.enqueue_trial(random.Random(seed).choice(left))
        trial = study.ask(space)
    if first:
        trial.set_user_attr(GIVEN, True)
    return trial


def allowed(study: optuna.Study, search: SearchConfig) -> list[dict[str, Value]]:
    """What may be chosen together: all that was not refused."""
    refused = [choices_of(trial, search) for trial in asked(study) if REFUSED in trial.user_attrs]
    choices = {key: list(map(text, d.choices)) for key, d in search.space.items() if d.choices is not None}
    combined: list[dict[str, Value]] = [
        dict(zip(choices, chosen, strict=True)) for chosen in product(*choices.values())
    ]
    return [chosen for chosen in combined if chosen not in refused]


def choices_of(trial: optuna.Trial | FrozenTrial, search: SearchConfig) -> dict[str, Value]:
    """Its values that are not from a range."""
    return {key: value for key, value in values_of(trial).items() if search.space[key].choices is not None}


def values_of(trial: optuna.Trial | FrozenTrial) -> dict[str, Value]:
    """To four digits, with which a command line is short and exact."""
    return {key: float(f"{v:.4g}") if isinstance(v, float) else v for key, v in trial.params.items()}


def as_overrides(values: dict[str, Value]) -> list[str]:
    return [f"{key}={value}" for key, value in values.items()]


def contains(dimension: BaseDistribution, value: Value) -> bool:
    match dimension:
        case FloatDistribution():
            return isinstance(value, int | float) and dimension.low <= value <= dimension.high
        case CategoricalDistribution():
            return value in dimension.choices
    return False


def given_values(config: Config, search: SearchConfig) -> dict[str, Value]:
    """What the configuration has at the keys of the space; of a group, its member's name."""
    return {key: _given(config, key, dimension) for key, dimension in search.space.items()}


def _given(config: Config, key: str, dimension: Dimension) -> Value:
    try:
        value = attrgetter(key)(config)
    except AttributeError:
        raise UserError(f"search.space: {key} is no key of this configuration") from None
    value = getattr(value, "name", value) if dataclasses.is_dataclass(value) else value
    return text(value) if dimension.choices is not None or not isinstance(value, int | float) else float(value)


def compose_overrides(overrides: Sequence[str]) -> Config:
    """Raises UserError if the configuration cannot be composed."""
    try:
        return compose_config(overrides)
    except HydraException as error:
        raise UserError(f"the configuration with {' '.join(overrides)} cannot be composed: {error}") from error
