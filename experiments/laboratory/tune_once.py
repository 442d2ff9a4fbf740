"""Tune at one batch size and run at all of them: what it costs, and which reference batch size R transfers best.

One letter per axis: M method, L learning rate, B batch size, S seed. Losses are final ones, in nats per target.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.documents import Cell, Table
from experiments.drawing import across_batch_sizes, bars
from experiments.estimate import Array, Estimate, Finding, interval, listed, resamples
from experiments.grid import Grid, arrange
from experiments.invariance.figure import appearances
from experiments.jobs import Result
from experiments.laboratory.batch_size_invariance import Invariance
from experiments.laboratory.schemas import TuneOnceConfig
from experiments.study import Outcome
from experiments.themes import Theme, canvas

LOSSES = {"training": "train_loss", "held-out": "test_loss"}


@dataclass(frozen=True)
class Transfer:
    """Of one of the losses, on which all tuning is done.

    regret: (M, B), the loss at the lr tuned at the tuning batch size, minus the reference's tuned at each B;
    cost: (M,), the loss at the tuning batch size, minus the reference's.
    """

    regret: Array
    mean: Array  # (M,), over the batch sizes of regrets
    cost: Array
    tuned_at: Array  # (B, M), what `mean` is with each batch size for the tuning batch size


def transfer(loss: Array, home: int, reference: int, averaged: Sequence[int]) -> Transfer:
    """loss: (S, M, L, B); home: the index of the tuning batch size; averaged: those of the batch sizes of `mean`."""
    mean = loss.mean(axis=0)  # (M, L, B)
    every = np.arange(len(mean))
    tuned = mean.argmin(axis=1)  # (M, B)
    kept = np.stack([mean[every, lr] for lr in tuned.T])  # (B, M, B), tuned where the first B says
    regret = kept - mean[reference].min(axis=0)
    means = regret[..., list(averaged)].mean(axis=-1)
    return Transfer(regret[home], means[home], kept[home, :, home] - kept[home, reference, home], means)


class TuneOnce(Invariance[TuneOnceConfig]):
    title = "Tune once"
    question = (
        "What does it cost to tune at one batch size and run at all, and which reference batch size transfers best?"
    )
    source = "McAllester, TTIC 31230: values tuned at one batch size hold at any (R = 1); R = B0 begins as torch's Adam"

    def subsets(self) -> list[tuple[str, list[Any], list[Any]]]:
        chosen = ("regret_batch_sizes", self.settings.regret_batch_sizes, self.settings.batch_sizes)
        return [*super().subsets(), chosen]

    def outcome(self, results: Sequence[Result]) -> Outcome:
        settings = self.settings
        grid = arrange([result.found for result in results])
        comparison = self.comparison()
        order = [*comparison.ours_in(grid), *comparison.baselines_in(grid), *comparison.kin_in(grid)]
        regrets = Regrets(grid, comparison.tuning_in(grid), comparison.reference_in(grid), settings)
        return Outcome(
            tables=[
                table(kind, order, comparison.ours_in(grid))
                for table in (regrets.table, regrets.where_to_tune)
                for kind in LOSSES
            ],
            findings=regrets.findings(comparison.ours_in(grid), comparison.baselines_in(grid)),
            draw=lambda theme: draw(regrets, order, comparison.ours_in(grid), theme),
            caption=f"Left and middle: final loss at each batch size with the learning rate tuned at B = "
            f"{settings.tuning_batch_size}, minus that of {regrets.label(regrets.reference)} tuned at that batch size; "
            "below zero is better. Right: mean regret against what the method costs where it was tuned. "
            f"Means over {len(grid.seeds)} seeds; bars are 95% bootstrap intervals.",
            alternative="; ".join(
                f"{regrets.label(m)}: mean regret {regrets.mean('training', m)} on the training loss, "
                f"{regrets.mean('held-out', m)} held out"
                for m in order
            ),
            terms={
                "Transfer regret": "Final loss at a batch size with what was tuned once, minus that of the reference "
                "tuned at that batch size. All tuning is on the loss of the table.",
                "Cost": "Final loss at the batch size of tuning, minus the reference's: what the method gives away "
                "where there is nothing to transfer.",
            },
        )


class Regrets:
    """Every number with its interval over seeds, tuning repeated in each resample."""

    def __init__(self, grid: Grid, home: int, reference: int, settings: TuneOnceConfig) -> None:
        self.grid, self.reference, self.settings = grid, reference, settings
        averaged = grid.columns(settings.regret_batch_sizes)
        # One seed cannot be resampled.
        chosen = list(resamples(len(grid.seeds))) if len(grid.seeds) > 1 else []
        self.point: dict[str, Transfer] = {}
        self.draws: dict[str, list[Transfer]] = {}
        for kind, name in LOSSES.items():
            loss = np.moveaxis(getattr(grid, name)[..., -1], 3, 0)  # (S, M, L, B)
            self.point[kind] = transfer(loss, home, reference, averaged)
            self.draws[kind] = [transfer(loss[rows], home, reference, averaged) for rows in chosen]

    def label(self, method: int) -> str:
        return self.grid.labels[method]

    def estimate(self, kind: str, value: Callable[[Transfer], float]) -> Estimate:
        draws = np.array([value(draw) for draw in self.draws[kind]])
        return interval(float(value(self.point[kind])), draws, len(self.grid.seeds))

    def at(self, kind: str, method: int, size: int) -> Estimate:
        return self.estimate(kind, lambda found: found.regret[method, size])

    def mean(self, kind: str, method: int) -> Estimate:
        return self.estimate(kind, lambda found: found.mean[method])

    def cost(self, kind: str, method: int) -> Estimate:
        return self.estimate(kind, lambda found: found.cost[method])

    def tuned_at(self, kind: str, method: int, size: int) -> Estimate:
        return self.estimate(kind, lambda found: found.tuned_at[size, method])

    def margin(self, kind: str, method: int, rules: Sequence[int]) -> Estimate:
        """Mean regret minus half of the best rule's, or minus the best rule's where that is negative."""

        def excess(found: Transfer) -> float:
            best = float(found.mean[list(rules)].min())
            return float(found.mean[method]) - (best / 2 if best > 0 else best)

        return self.estimate(kind, excess)

    def table(self, kind: str, order: Sequence[int], ours: Sequence[int]) -> Table:
        sizes = self.grid.batch_sizes
        rows: list[list[Cell]] = [
            [
                self.label(m),
                *(self.at(kind, m, b) for b in range(len(sizes))),
                self.mean(kind, m),
                self.cost(kind, m),
            ]
            for m in order
        ]
        return Table(
            f"Transfer regret on the {kind} loss",
            f"Tuned at B = {self.settings.tuning_batch_size} on that loss; the mean is over B in "
            f"{listed(self.settings.regret_batch_sizes)}. Brackets: 95% bootstrap intervals over "
            f"{len(self.grid.seeds)} seeds.",
            ["optimizer", *(f"B = {size}" for size in sizes), "mean", "cost"],
            rows,
            tuple(order.index(m) for m in ours),
        )

    def where_to_tune(self, kind: str, order: Sequence[int], ours: Sequence[int]) -> Table:
        sizes = self.grid.batch_sizes
        rows: list[list[Cell]] = [
            [self.label(m), *(self.tuned_at(kind, m, b) for b in range(len(sizes)))] for m in order
        ]
        return Table(
            f"Where to tune: mean transfer regret on the {kind} loss",
            f"The mean over B in {listed(self.settings.regret_batch_sizes)}, with the learning rate that is best at "
            "the batch size of the column.",
            ["optimizer", *(f"tuned at {size}" for size in sizes)],
            rows,
            tuple(order.index(m) for m in ours),
        )

    def findings(self, ours: Sequence[int], baselines: Sequence[int]) -> list[Finding]:
        return [
            *(self._bar(kind, ours[0], baselines) for kind in LOSSES),
            *(self._best(kind, ours) for kind in LOSSES),
            *(self._at_the_largest(kind, ours[0]) for kind in LOSSES),
        ]

    def _at_the_largest(self, kind: str, method: int) -> Finding:
        """What is stable at the largest batch size is stable at all."""
        size, home = self.grid.batch_sizes[-1], self.settings.tuning_batch_size
        gap = self.estimate(kind, lambda found: found.tuned_at[-1, method] - found.mean[method])
        bar = f"{self.label(method)} transfers at least as well on the {kind} loss if tuned at B = {size}"
        sentence = (
            f"Its mean regret is then {self.tuned_at(kind, method, -1)}, and {self.mean(kind, method)} if tuned at "
            f"B = {home}: a difference of {gap}."
        )
        return Finding(bar, gap.verdict(0.0), sentence)

    def _bar(self, kind: str, method: int, rules: Sequence[int]) -> Finding:
        point = self.point[kind].mean
        best = min(rules, key=lambda m: float(point[m]))
        margin = self.margin(kind, method, rules)
        bar = (
            f"{self.label(method)}: mean transfer regret on the {kind} loss at most half of the best rule's, "
            "or below it where that is negative"
        )
        sentence = (
            f"Over B in {listed(self.settings.regret_batch_sizes)} it is {self.mean(kind, method)}, and the lowest of "
            f"a rule ({self.label(best)}) is {self.mean(kind, best)}: {margin} above the bar."
        )
        return Finding(bar, margin.verdict(0.0), sentence)

    def _best(self, kind: str, ours: Sequence[int]) -> Finding:
        """Whether any R is better than the first one, which is the default."""
        default, others = ours[0], list(ours[1:])
        told = "; ".join(f"{self.label(m)} {self.mean(kind, m)} at a cost of {self.cost(kind, m)}" for m in ours)
        bar = f"The default, {self.label(default)}, transfers as well on the {kind} loss as any R that was tried"
        if not others:
            return Finding(bar, "cannot be judged", f"No other R was tried: {told}.")
        gap = self.estimate(kind, lambda found: found.mean[default] - found.mean[others].min())
        best = min(others, key=lambda m: float(self.point[kind].mean[m]))
        sentence = f"Its mean regret is {gap} above the lowest of the others, that of {self.label(best)}: {told}."
        return Finding(bar, gap.verdict(0.0), sentence)


def draw(regrets: Regrets, order: Sequence[int], ours: Sequence[int], theme: Theme) -> Figure:
    looks = appearances(len(order), ours, regrets.reference, theme)
    with canvas(theme, 8.0, 3.6) as figure:
        left, middle, right = figure.subplots(1, 3)
        for axes, kind in zip((left, middle), LOSSES, strict=True):
            _regret(axes, regrets, kind, order, looks, theme)
        left.set_ylabel("regret (nats)")
        for m in order:
            colour, marker = looks[m]
            x, y = regrets.cost("training", m), regrets.mean("training", m)
            style: Any = {"color": colour, "marker": marker, "markersize": 5, "linewidth": 0.8}
            right.errorbar([x.value], [y.value], xerr=bars([x]), yerr=bars([y]), **style)
        right.set_xlabel("cost where tuned (nats)")
        right.set_title("Mean regret, training")
        right.set_xscale("symlog", linthresh=0.01)
        right.set_yscale("symlog", linthresh=0.01)
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=7.5)
    return figure


def _regret(
    axes: Axes, regrets: Regrets, kind: str, order: Sequence[int], looks: Sequence[tuple[str, str]], theme: Theme
) -> None:
    sizes = regrets.grid.batch_sizes
    for m in order:
        colour, marker = looks[m]
        values = regrets.point[kind].regret[m]
        axes.plot(sizes, values, color=colour, marker=marker, markersize=3.5, linewidth=1.2, label=regrets.label(m))
    axes.axhline(0, color=theme.faint, linewidth=0.8)
    across_batch_sizes(axes, sizes)
    axes.set_yscale("symlog", linthresh=0.01)
    axes.set_title(f"Regret, {kind} loss")


STUDY = TuneOnce
