"""Stochastic gradient descent in one dimension: which learning rates converge, and what noise leaves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from experiments.errors import UserError
from experiments.jobs import Job, Result
from experiments.laboratory.one_dimensional.analysis import EDGE, FACTOR_STEPS, analyse
from experiments.laboratory.one_dimensional.figure import alternative, caption, draw
from experiments.laboratory.one_dimensional.findings import findings
from experiments.laboratory.one_dimensional.runs import LATE, descend, descend_without_noise, gradient_at_minimum
from experiments.laboratory.one_dimensional.tables import TERMS, tables
from experiments.laboratory.schemas import OneDimensionalConfig
from experiments.laboratory.terms import intervals
from experiments.schemas.run import Config
from experiments.study import Outcome, Study


class OneDimensional(Study[OneDimensionalConfig]):
    title = "Convergence in one dimension"
    question = (
        "Which learning rates converge on (beta - y)^2 / 2 with noisy y, and what does noise leave of the others?"
    )
    source = (
        "McAllester, TTIC 31230, SGD, Momentum, RMSProp, Adam: convergence where the learning rates sum to infinity "
        "and their squares do not; Robbins & Monro 1951"
    )
    reads = ()

    def check(self) -> None:
        super().check()
        s = self.settings
        if s.steps < 2 * LATE:
            raise UserError(f"study.steps={s.steps} must be {2 * LATE} or more, to see whether errors still fall")
        if not 0 < s.scale < 1:
            raise UserError(f"study.scale={s.scale} must be between 0 and 1: at 1 the first step forgets the start")
        if s.rate_steps < FACTOR_STEPS:
            raise UserError(f"study.rate_steps={s.rate_steps} must be {FACTOR_STEPS} or more, to measure factors over")
        if EDGE not in s.rates:
            raise UserError(f"study.rates={s.rates} must have {EDGE:g}, the edge of stability")

    def jobs(self, config: Config, known: Sequence[Result]) -> list[Job]:
        s = self.settings
        jobs: list[Job] = []
        for seed in s.seeds:
            common: Any = {"noise": s.noise, "repetitions": s.repetitions, "seed": seed}
            for B in s.batch_sizes:
                jobs.append(self.measurement(config, gradient_at_minimum, cost=B, batch_size=B, **common))
                runs = [(s.scale, power, s.steps) for power in s.powers] + [(EDGE, 0.0, s.rate_steps)]
                jobs += [
                    self.measurement(
                        config,
                        descend,
                        cost=steps * (4 + B),
                        scale=scale,
                        power=power,
                        batch_size=B,
                        steps=steps,
                        start=s.start,
                        **common,
                    )
                    for scale, power, steps in runs
                ]
            jobs += [
                self.measurement(config, descend_without_noise, rate=rate, steps=s.rate_steps, start=s.start, seed=seed)
                for rate in s.rates
            ]
        return jobs

    def outcome(self, results: Sequence[Result]) -> Outcome:
        analysis = analyse(self.settings, results)
        return Outcome(
            tables=tables(analysis),
            findings=findings(analysis),
            draw=lambda theme: draw(analysis, theme),
            caption=caption(analysis),
            alternative=alternative(analysis),
            terms=TERMS | intervals(len(self.settings.seeds)),
        )


STUDY = OneDimensional
