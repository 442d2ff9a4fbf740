"""Private training: DP-SGD and DP-Adam, with norms by gradstats and Opacus' accountant."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import product

from experiments.contest.plan import bracket
from experiments.errors import UserError
from experiments.jobs import Job, Result
from experiments.laboratory.private.accounting import require_opacus
from experiments.laboratory.private.analysis import analyse, losses
from experiments.laboratory.private.figure import alternative, caption, draw
from experiments.laboratory.private.findings import findings
from experiments.laboratory.private.methods import METHODS
from experiments.laboratory.private.peers import BASES, difference, seconds
from experiments.laboratory.private.tables import TERMS, tables
from experiments.laboratory.private.training import trained
from experiments.laboratory.problem import data_of, problem_of
from experiments.laboratory.schemas import PrivateConfig
from experiments.laboratory.terms import intervals
from experiments.schemas.model import MLPConfig
from experiments.schemas.run import Config
from experiments.study import Outcome, Study

BASE_LRS = {"SGD": 0.5, "Adam": 1e-3}  # of the comparison with Opacus: any would do
SIGMA = 1.0  # of the same


class Private(Study[PrivateConfig]):
    title = "Private training"
    question = "What does differential privacy cost in accuracy, by DP-SGD and by DP-Adam, each tuned?"
    source = (
        "Abadi et al. 2016, arXiv:1607.00133: DP-SGD; Li et al. 2022, arXiv:2110.05679: DP-Adam, ghost clipping; Tang "
        "et al. 2023, arXiv:2312.14334: DP-Adam is DP-SGD unless its second moment is corrected"
    )
    reads = ("data", "model")

    def check(self) -> None:
        super().check()
        s = self.settings
        if set(s.lrs) != set(METHODS):
            raise UserError(f"study.lrs must have a learning rate for each of {', '.join(METHODS)}")
        if len(s.octaves) < 3:
            raise UserError(f"study.octaves={s.octaves}: three or more, or none has neighbours")
        if not s.epsilons or sorted(s.epsilons) != list(s.epsilons) or s.epsilons[0] <= 0:
            raise UserError(f"study.epsilons={s.epsilons} must be positive, and ascend")

    def jobs(self, config: Config, known: Sequence[Result]) -> list[Job]:
        require_opacus()
        s = self.settings
        if not isinstance(config.model, MLPConfig) or config.model.dropout > 0:
            raise UserError("model=mlp with model.dropout=0 here: the steps that are compared have no masks in common")
        problem = problem_of(config)
        if s.batch_size > len(data_of(problem).train):
            raise UserError(f"study.batch_size={s.batch_size} is more than there are training examples")
        wide = dataclasses.replace(config, model=dataclasses.replace(config.model, widths=[s.timed_width] * 2))
        return [
            *self._checks(config, problem, problem_of(wide)),
            *(
                self.measurement(
                    config,
                    trained,
                    s.epochs,
                    method=method,
                    lr=s.lrs[method] * 2**octave,
                    epsilon=epsilon,
                    delta=s.delta,
                    max_norm=s.max_norm,
                    batch_size=s.batch_size,
                    epochs=s.epochs,
                    floor=s.floor,
                    octave=octave,
                    seed=seed,
                    problem=problem,
                )
                for method, epsilon in product(METHODS, (*map(float, s.epsilons), None))
                for octave in bracket(s.octaves, losses(known, method, epsilon))
                for seed in s.seeds
            ),
        ]

    def _checks(self, config: Config, problem: str, wide: str) -> list[Job]:
        """The steps of gradstats against those of Opacus."""
        s = self.settings
        jobs: list[Job] = []
        for seed in s.seeds:
            for base in BASES:
                jobs.append(
                    self.measurement(
                        config,
                        difference,
                        problem=problem,
                        base=base,
                        lr=BASE_LRS[base],
                        sigma=SIGMA,
                        max_norm=s.max_norm,
                        batch_size=s.batch_size,
                        steps=s.checked_steps,
                        seed=seed,
                    )
                )
            jobs.append(
                self.measurement(
                    config,
                    seconds,
                    problem=wide,
                    base="SGD",
                    lr=BASE_LRS["SGD"],
                    sigma=SIGMA,
                    max_norm=s.max_norm,
                    batch_size=s.batch_size,
                    steps=s.timed_steps,
                    seed=seed,
                )
            )
        return jobs

    def outcome(self, results: Sequence[Result]) -> Outcome:
        analysis = analyse(self.settings, results)
        return Outcome(
            tables=tables(analysis),
            findings=findings(analysis),
            draw=lambda theme: draw(analysis, theme),
            caption=caption(analysis),
            alternative=alternative(analysis),
            terms=TERMS | intervals(len(self.settings.seeds), "tuning is repeated"),
        )


STUDY = Private
