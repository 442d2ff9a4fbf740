"""A batch that grows with the measured noise scale, against a learning rate that decays."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from itertools import product

from experiments.contest.plan import bracket, tuned_octave
from experiments.errors import UserError
from experiments.jobs import Job, Result
from experiments.laboratory.adaptive_batch.analysis import (
    Analysis,
    analyse,
    at_equal,
    losses_of,
    raced,
)
from experiments.laboratory.adaptive_batch.contenders import Contender, contenders
from experiments.laboratory.adaptive_batch.figure import alternative, caption, draw
from experiments.laboratory.adaptive_batch.findings import findings
from experiments.laboratory.adaptive_batch.runs import take_turns, trained
from experiments.laboratory.adaptive_batch.tables import TERMS, tables
from experiments.laboratory.problem import data_of, problem_of
from experiments.laboratory.schemas import AdaptiveBatchConfig
from experiments.laboratory.terms import DIVERGED, intervals
from experiments.schedule import budget
from experiments.schemas.optimizer import BatchInvariantAdamConfig
from experiments.schemas.run import Config
from experiments.study import Outcome, Study, default_optimizer


class AdaptiveBatch(Study[AdaptiveBatchConfig]):
    title = "A growing batch or a decaying learning rate"
    question = "Does a batch that grows with the measured noise scale reach what a tuned decay reaches, and sooner?"
    source = (
        "Smith et al. 2018, arXiv:1711.00489: don't decay the learning rate, increase the batch size; McCandlish et "
        "al. 2018, arXiv:1812.06162, appendix D: batch sizes that follow the noise scale"
    )
    reads = ("data", "model", "train.epochs", "train.warmup_examples")

    def check(self) -> None:
        super().check()
        s = self.settings
        sizes = [s.smallest, s.largest, *s.batch_sizes]
        if any(B < 1 or B & (B - 1) for B in sizes) or max(sizes) > s.largest or s.smallest >= s.largest:
            raise UserError(f"study: batch sizes {sizes} must be powers of two up to largest, which is above smallest")
        if s.horizon < 10 * s.largest or s.points < 2 or len(s.octaves) < 3:
            raise UserError("study: horizon must be 10 times largest or more, points 2 or more, octaves three or more")

    def jobs(self, config: Config, known: Sequence[Result]) -> list[Job]:
        s = self.settings
        method = default_optimizer(s.method)
        if not isinstance(method, BatchInvariantAdamConfig):
            raise UserError(f"study.method={s.method}: only a BatchInvariantAdam keeps its curve while the batch grows")
        everyone = contenders(s)
        problem = problem_of(config)
        examples = budget(config.train.epochs, len(data_of(problem).train), s.largest, s.largest)
        jobs: list[Job] = []
        best: dict[str, float] = {}
        for label, contender in everyone.items():
            jobs += self.tuning(config, contender, examples, known)
            if (octave := self.tuned(contender, examples, known)) is not None:
                best[label] = octave
        if len(best) < len(everyone):
            return jobs
        rows = {
            label: {"contender": dataclasses.asdict(contender), "lr": method.lr * 2 ** best[label]}
            for label, contender in everyone.items()
        }
        jobs += [
            self.measurement(
                config,
                take_turns,
                cost=10.0 * len(rows),
                problem=problem,
                method=s.method,
                contenders=json.dumps(rows),
                horizon=s.horizon,
                warmup=config.train.warmup_examples,
                examples=examples,
                multiple=s.largest,
                points=s.points,
                seed=seed,
            )
            for seed in s.seeds
        ]
        races = raced(known)
        if len(races) < len(s.seeds):
            return jobs
        for (*_, rival), limited in at_equal(s, races, config.train.warmup_examples).items():
            jobs += self.tuning(config, everyone[rival], limited, known)
        return list({job.directory: job for job in jobs}.values())

    def tuning(self, config: Config, contender: Contender, examples: int, known: Sequence[Result]) -> list[Job]:
        s = self.settings
        base = default_optimizer(s.method).lr
        losses = losses_of(known, contender, examples, base)
        return [
            self.measurement(
                config,
                trained,
                cost=examples * (1 / contender.smallest + 1 / 64),
                problem=problem_of(config),
                method=s.method,
                smallest=contender.smallest,
                largest=contender.largest,
                decay=contender.decay.value,
                constant_step=contender.constant_step,
                lr=base * 2.0**octave,
                horizon=s.horizon,
                warmup=config.train.warmup_examples,
                examples=examples,
                seed=seed,
            )
            for octave, seed in product(bracket(s.octaves, losses), s.seeds)
        ]

    def tuned(self, contender: Contender, examples: int, known: Sequence[Result]) -> float | None:
        """The octave of the best learning rate, once it has a neighbour on either side."""
        losses = losses_of(known, contender, examples, default_optimizer(self.settings.method).lr)
        return tuned_octave(self.settings.octaves, losses)

    def analysed(self, results: Sequence[Result]) -> Analysis:
        return analyse(self.settings, results, default_optimizer(self.settings.method).lr)

    def outcome(self, results: Sequence[Result]) -> Outcome:
        analysis = self.analysed(results)
        return Outcome(
            tables=tables(analysis),
            findings=findings(analysis),
            draw=lambda theme: draw(analysis, theme),
            caption=caption(analysis),
            alternative=alternative(analysis),
            terms=TERMS | intervals(len(self.settings.seeds), "tuning is repeated") | DIVERGED,
        )


STUDY = AdaptiveBatch
