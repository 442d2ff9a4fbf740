"""What the trials of a search say: the table, the sentence, the figure and the command of the best one."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, inf, nan
from pathlib import Path
from typing import Literal

import numpy as np
import optuna
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from optuna.trial import FrozenTrial, TrialState

from experiments.documents import Table
from experiments.errors import UserError
from experiments.estimate import Array, Finding, notes, over_seeds
from experiments.schemas.run import SearchConfig, Searched
from experiments.study import Outcome
from experiments.themes import LIGHT, Theme, canvas
from experiments.trials import (
    GIVEN,
    NOTE,
    OVER,
    REFUSED,
    Value,
    as_overrides,
    asked,
    text,
    values_of,
)

State = Literal["finished", "diverged", "pruned", "refused"]

COLUMNS = 3  # of the figure
FEWEST = 8  # trials from which importance is said: of two, any value may explain all
SMALLEST_LOSS = 1e-7  # below it a float32 loss is rounding


@dataclass(frozen=True)
class Trial:
    """losses: one a seed; of a pruned trial the one at which it was broken off, of a refused one none.

    given: its values are those of the configuration that the search began with.
    """

    number: int  # counted from 0, without those that were killed
    state: State
    values: dict[str, Value]
    losses: tuple[float, ...]
    examples: int
    given: bool

    @property
    def loss(self) -> float:
        """The mean over the seeds."""
        return sum(self.losses) / len(self.losses) if self.losses else nan


@dataclass(frozen=True)
class Confirmation:
    """Final losses on the seeds of search.confirm_seeds, in their order: (S,)."""

    best: Array
    first: Array


def read(study: optuna.Study) -> list[Trial]:
    """Raises UserError if no trial came to its end."""
    trials = [
        Trial(
            i,
            state(t),
            values_of(t),
            tuple(noted.get("losses", ())),
            noted.get("examples", 0),
            given=GIVEN in t.user_attrs,
        )
        for i, t in enumerate(asked(study))
        for noted in [t.user_attrs.get(NOTE, {})]
    ]
    if not any(trial.state == "finished" for trial in trials):
        refusals = [trial.user_attrs[REFUSED] for trial in asked(study) if REFUSED in trial.user_attrs]
        why = f"the last refusal: {refusals[-1]}" if refusals else "lower the learning rates of the space"
        raise UserError(f"none of {len(trials)} trials came to its end; {why}")
    return trials


def state(trial: FrozenTrial) -> State:
    if trial.state not in OVER:
        return "refused"
    if trial.state is TrialState.PRUNED:
        return "pruned"
    return "diverged" if trial.user_attrs[NOTE]["diverged"] else "finished"


def ranked(trials: Sequence[Trial]) -> list[Trial]:
    """Finished ones by their loss, then the others in their order."""
    return sorted(trials, key=lambda trial: trial.loss if trial.state == "finished" else inf)


def outcome(
    trials: Sequence[Trial], search: SearchConfig, confirmed: Confirmation | None, weights: dict[str, float]
) -> Outcome:
    """weights: those of `importances`."""
    loss = name_of(search.loss)
    states = [trial.state for trial in trials]
    ended = ", ".join(f"{states.count(kind)} {kind}" for kind in dict.fromkeys(states))
    return Outcome(
        tables=[table(trials, search)],
        findings=[finding(trials, search, confirmed), *importance_findings(weights, states)],
        draw=lambda theme: draw(trials, search, weights, theme),
        caption=f"{len(trials)} trials: {ended}. Open: pruned, with their last loss, or diverged. Ringed: the best.",
        alternative=f"The {loss} of {len(trials)} trials, in their order and against each searched value.",
    )


def name_of(loss: Searched) -> str:
    return {Searched.train: "training loss", Searched.test: "test loss"}[loss]


def table(trials: Sequence[Trial], search: SearchConfig) -> Table:
    seeds = f"the mean over seeds {', '.join(map(str, search.seeds))}" if len(search.seeds) > 1 else "of one seed"
    return Table(
        "Trials",
        f"Final {name_of(search.loss)}, {seeds}; of a pruned trial that of its first seed, where it was broken off.",
        ["trial", "state", name_of(search.loss), *(key.replace(".", " ") for key in search.space), "examples"],
        [
            [
                str(trial.number),
                trial.state,
                f"{trial.loss:.4g}" if trial.losses else "–",
                *(told(trial.values[key]) for key in search.space),
                f"{trial.examples:,}",
            ]
            for trial in ranked(trials)
        ],
        (0,),
    )


def told(value: Value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else value


def finding(trials: Sequence[Trial], search: SearchConfig, confirmed: Confirmation | None) -> Finding:
    """Whether the search was worth its while."""
    best, given, loss = ranked(trials)[0], trials[0], name_of(search.loss)
    values = " ".join(as_overrides(best.values))
    sentence = f"The lowest {loss} of {len(trials)} trials is {best.loss:.4g}, of trial {best.number}: {values}."
    bar = f"The search finds a lower {loss} than the configuration it began with"
    if not given.given:
        return Finding(bar, "cannot be judged", f"{sentence} What it began with is not in the space: it was not run.")
    if best is given:
        return Finding(bar, "does not hold", f"{sentence} That is what it began with.")
    if confirmed is None:
        return Finding(bar, "cannot be judged", f"{sentence} The first trial, {given.state}, has no final loss.")
    difference = over_seeds(confirmed.best - confirmed.first)
    sentence += (
        f" On {len(confirmed.best)} seeds that had no part in the choice it has {confirmed.best.mean():.4g}, and the "
        f"first trial {confirmed.first.mean():.4g}: a difference of {difference}."
    )
    return Finding(bar, difference.verdict(0), sentence)


def importances(study: optuna.Study) -> dict[str, float]:
    """The share of the variance of ln(loss), over the trials that ended, which each value explains (fANOVA, Hutter
    2014); none of few trials, or of equal ones."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len(complete) < FEWEST or len({trial.value for trial in complete}) < 2:
        return {}
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    return optuna.importance.get_param_importances(
        study, evaluator=evaluator, target=lambda trial: float(np.log(max(trial.value or 0.0, SMALLEST_LOSS)))
    )


def importance_findings(weights: dict[str, float], states: Sequence[State]) -> list[Finding]:
    if not weights:
        return []
    shares = ", ".join(f"{key} {share:.0%}" for key, share in weights.items())
    count = states.count("finished") + states.count("diverged")
    return notes([f"Of the variance of ln(loss) over the {count} trials that ended, by fANOVA: {shares}."])


def draw(trials: Sequence[Trial], search: SearchConfig, weights: dict[str, float], theme: Theme = LIGHT) -> Figure:
    """Loss by trial with the best so far; then the loss against each searched value, the most important first."""
    keys = [*weights, *(key for key in search.space if key not in weights)]
    columns = 2 if len(keys) == 3 else min(COLUMNS, 1 + len(keys))
    rows = ceil((1 + len(keys)) / columns)
    with canvas(theme, 3.0 * columns, 2.6 * rows) as figure:
        panels = figure.subplots(rows, columns, sharey=True, squeeze=False).flatten().tolist()
        history(panels[0], trials, theme)
        for axes, key in zip(panels[1:], keys, strict=False):
            title = f"{weights[key]:.0%} of the variance" if key in weights else ""
            against(axes, key, title, trials, search, theme)
        for axes in panels[1 + len(keys) :]:
            axes.set_visible(False)
        for axes in panels[::columns]:
            axes.set_ylabel(f"{name_of(search.loss)} (nats)")
    return figure


def history(axes: Axes, trials: Sequence[Trial], theme: Theme) -> None:
    scatter(axes, [trial.number for trial in trials], trials, theme)
    best = np.minimum.accumulate([trial.loss if trial.state == "finished" else inf for trial in trials])
    axes.step(range(len(trials)), best, where="post", color=theme.reference, linewidth=1)
    axes.set(title="best so far", xlabel="trial", yscale="log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def against(axes: Axes, key: str, title: str, trials: Sequence[Trial], search: SearchConfig, theme: Theme) -> None:
    dimension = search.space[key]
    axes.set(title=title, xlabel=key)
    if dimension.choices is None:
        scatter(axes, [float(trial.values[key]) for trial in trials], trials, theme)
        axes.set_xscale("log" if dimension.log else "linear")
    else:
        choices = [text(choice) for choice in dimension.choices]
        scatter(axes, [choices.index(str(trial.values[key])) for trial in trials], trials, theme)
        axes.set_xticks(range(len(choices)), choices)


def scatter(axes: Axes, x: Sequence[float], trials: Sequence[Trial], theme: Theme) -> None:
    for filled in (True, False):
        chosen = [i for i, trial in enumerate(trials) if trial.losses and (trial.state == "finished") is filled]
        axes.scatter(
            [x[i] for i in chosen],
            [max(trials[i].loss, SMALLEST_LOSS) for i in chosen],
            s=18,
            facecolors=theme.ours[0] if filled else "none",
            edgecolors=theme.ours[0] if filled else theme.faint,
            linewidths=0.8,
        )
    best = ranked(trials)[0]
    axes.scatter([x[best.number]], [best.loss], s=60, facecolors="none", edgecolors=theme.baselines[1], linewidths=1.5)


def command_of_best(trials: Sequence[Trial], overrides: Sequence[str], search: SearchConfig, directory: Path) -> str:
    """What trains the best trial's first seed again, by itself."""
    own = {**ranked(trials)[0].values, "seed": str(search.seeds[0]), "directory": str(directory / "best")}
    kept = without(overrides, {*own, "resume"})
    return shlex.join(["python", "-m", "experiments.train", *kept, "~search", *as_overrides(own)])


def without(overrides: Sequence[str], keys: set[str]) -> list[str]:
    """The overrides of other keys, and none of the search's."""
    named = [(override.lstrip("+~").partition("=")[0], override) for override in overrides]
    return [override for key, override in named if key not in keys and key.partition(".")[0] != "search"]
