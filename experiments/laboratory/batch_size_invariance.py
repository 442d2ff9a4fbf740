"""Tune every method once, at one batch size, and see what that tuning is worth at the others."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

from experiments.errors import UserError
from experiments.estimate import listed
from experiments.invariance.analysis import Analysis, Comparison, analyse
from experiments.invariance.figure import draw
from experiments.invariance.findings import findings
from experiments.invariance.tables import tables
from experiments.jobs import Job, Result
from experiments.laboratory.schemas import BatchSizeInvarianceConfig
from experiments.laboratory.terms import DIVERGED, intervals
from experiments.schemas.run import Config
from experiments.study import OF_RUNS, Outcome, Study, default_optimizer

S = TypeVar("S", bound=BatchSizeInvarianceConfig)


class Invariance(Study[S]):
    """The runs, for any question about them."""

    reads = OF_RUNS

    def check(self) -> None:
        super().check()
        settings = self.settings
        methods = [*settings.ours, *settings.baselines, *settings.kin]
        if len(set(methods)) < len(methods):
            raise UserError(f"study.ours, study.baselines and study.kin: {methods} must have each method once")
        for key, subset, whole in self.subsets():
            if strangers := [value for value in subset if value not in whole]:
                raise UserError(f"study.{key} has {strangers}, which the study does not run: choose among {whole}")
        if len(settings.score_batch_sizes) < 2:
            raise UserError(
                f"study.score_batch_sizes has {settings.score_batch_sizes}: a score needs two batch sizes or more"
            )

    def subsets(self) -> list[tuple[str, list[Any], list[Any]]]:
        """Settings that choose among the values of others: name, values, what they are chosen from."""
        settings = self.settings
        return [
            ("score_batch_sizes", settings.score_batch_sizes, settings.batch_sizes),
            ("tuning_batch_size", [settings.tuning_batch_size], settings.batch_sizes),
            ("reference", [settings.reference], settings.baselines),
        ]

    def jobs(self, config: Config, known: Sequence[Result]) -> list[Job]:
        """All methods share data, model, budget and schedule."""
        settings = self.settings
        runs: list[Job] = []
        methods = {name: default_optimizer(name) for name in [*settings.ours, *settings.baselines, *settings.kin]}
        if unknown := [key for key in settings.options if not any(hasattr(m, key) for m in methods.values())]:
            raise UserError(f"study.options has {unknown}, which none of {', '.join(methods)} has")
        for default in methods.values():
            options = {key: value for key, value in settings.options.items() if hasattr(default, key)}
            for multiplier in settings.lr_multipliers:
                lr, home = default.lr * multiplier, settings.tuning_batch_size
                optimizer = dataclasses.replace(default, **options | {"lr": lr, "batch_size": home})
                runs += [
                    self.training(config, optimizer, batch_size, seed)
                    for batch_size in settings.batch_sizes
                    for seed in settings.seeds
                ]
        return runs

    def comparison(self) -> Comparison:
        settings = self.settings
        return Comparison(
            ours=tuple(settings.ours),
            kin=tuple(settings.kin),
            reference=settings.reference,
            tuning_batch_size=settings.tuning_batch_size,
            score_batch_sizes=tuple(settings.score_batch_sizes),
            loss_targets=tuple(settings.loss_targets),
        )


class BatchSizeInvariance(Invariance[BatchSizeInvarianceConfig]):
    title = "Batch-size invariance"
    question = "Does the learning curve, against examples seen, stay when the batch size changes?"
    source = "McAllester, TTIC 31230, SGD, Momentum, RMSProp, Adam: the second moment as a mean over examples"

    def outcome(self, results: Sequence[Result]) -> Outcome:
        analysis, settings = analyse([result.found for result in results], self.comparison()), self.settings
        return Outcome(
            tables=tables(analysis),
            findings=findings(analysis),
            draw=lambda theme: draw(analysis, theme),
            caption=caption(settings),
            alternative=alternative(analysis),
            terms=terms(settings) | intervals(len(settings.seeds), "tuning is repeated") | DIVERGED,
        )


def caption(settings: BatchSizeInvarianceConfig) -> str:
    home = settings.tuning_batch_size
    return (
        "Top: training loss against examples seen, one line a batch size, geometric mean over seeds, each optimizer at "
        f"the learning rate tuned at B = {home}; where an optimizer is invariant, its lines coincide. Bottom left: "
        "score against final loss, one point a learning rate, the large one tuned; lower and further left is better. "
        "The dashed line is how much runs differ by their seed alone. Bottom middle: what the tuning at "
        f"B = {home} costs at other batch sizes."
    )


def alternative(analysis: Analysis) -> str:
    scores = "; ".join(
        f"{label}: score {score:.2g}, mean transfer regret {regret:.2g}"
        for label, score, regret in zip(
            analysis.grid.labels, analysis.point.score, analysis.point.mean_regret, strict=True
        )
    )
    return (
        f"Learning curves over batch sizes, score against final loss, and transfer regret over batch sizes. {scores}."
    )


def terms(settings: BatchSizeInvarianceConfig) -> dict[str, str]:
    home, sizes = settings.tuning_batch_size, listed(settings.score_batch_sizes)
    return {
        "Score": f"The standard deviation over batch sizes (B in {sizes}) of ln(training loss) at the same number of "
        "examples, mean over log-spaced checkpoints after 5% of the budget, mean over seeds. 0.1 means that curves are "
        "about 10% apart. A score means nothing alone: any method's tends to 0 with its learning rate. So methods are "
        "compared at matched final loss.",
        "Matched final loss": f"The score where a method reaches a given final loss at B = {home}, interpolated in "
        "ln(loss) along its learning rates at and below the tuned one. Above it a method reaches the same loss again, "
        "by being unstable.",
        "Transfer regret": f"Final loss at a batch size, with the learning rate tuned at B = {home}, minus that of the "
        "reference (the table names it) with its learning rate tuned at that batch size. Zero: tuning once was as good "
        "as tuning the reference everywhere. Negative: better.",
        "Seed floor": "The score with seeds in place of batch sizes: runs cannot be told apart below it from single "
        "runs. Scores themselves compare runs of one seed, and can be lower.",
    }


STUDY = BatchSizeInvariance
