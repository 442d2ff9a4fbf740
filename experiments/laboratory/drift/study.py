"""How fast the true gradient changes along training, against the noise of its estimates: which average is best?"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from experiments.errors import UserError
from experiments.jobs import Job, Result
from experiments.laboratory.drift.analysis import analyse, losses, tuned
from experiments.laboratory.drift.figure import alternative, caption, draw
from experiments.laboratory.drift.findings import findings
from experiments.laboratory.drift.follow import beta_of, follow
from experiments.laboratory.drift.tables import TERMS, tables
from experiments.laboratory.problem import data_of, problem_of
from experiments.laboratory.schemas import DriftConfig
from experiments.laboratory.terms import intervals
from experiments.schedule import budget
from experiments.schemas.model import MLPConfig
from experiments.schemas.optimizer import BatchInvariantAdamConfig
from experiments.schemas.run import Config, Decay
from experiments.study import OF_RUNS, Outcome, Study, default_optimizer


class Drift(Study[DriftConfig]):
    title = "Drift of the gradient against its noise"
    question = "How many examples may an average of gradients remember before drift outweighs the noise it takes away?"
    source = (
        "McAllester, TTIC 31230, SGD, Momentum, RMSProp, Adam: a running average estimates the gradient because it "
        "drifts slowly compared with its noise"
    )
    reads = (*OF_RUNS, "train.batch_size")

    def check(self) -> None:
        super().check()
        s = self.settings
        if s.phases < 2 or s.lengths < 3:
            raise UserError(f"study.phases={s.phases} must be 2 or more, and study.lengths={s.lengths} 3 or more")

    def jobs(self, config: Config, known: Sequence[Result]) -> list[Job]:
        s, train = self.settings, config.train
        if isinstance(config.model, MLPConfig) and config.model.dropout > 0:
            raise UserError("model.dropout must be 0 here: with it the true gradient could only be estimated")
        if train.decay is not Decay.none or train.max_norm is not None:
            raise UserError(
                "train.decay must be none and train.max_norm null here: the run that is followed has neither"
            )
        adam = default_optimizer(s.method)
        if not isinstance(adam, BatchInvariantAdamConfig):
            raise UserError(f"study.method={s.method}: only a BatchInvariantAdam can be followed")
        first: list[Job] = [
            self.training(
                config,
                dataclasses.replace(
                    adam, lr=adam.lr * multiplier, betas=(beta_of(horizon, adam.batch_size), adam.betas[1])
                ),
                train.batch_size,
                seed,
                horizon=horizon,
                multiplier=multiplier,
            )
            for horizon in s.horizons
            for multiplier in s.lr_multipliers
            for seed in s.seeds
        ]
        if not known:
            return first
        problem = problem_of(config)
        chosen = tuned(losses(known).values)
        examples = len(data_of(problem).train)
        return [
            *first,
            *(
                self.measurement(
                    config,
                    follow,
                    problem=problem,
                    method=s.method,
                    lr=adam.lr * s.lr_multipliers[best],
                    horizon=horizon,
                    tuned_batch_size=adam.batch_size,
                    batch_size=train.batch_size,
                    examples=budget(train.epochs, examples, config.evaluation.multiple, train.batch_size),
                    warmup=train.warmup_examples,
                    phases=s.phases,
                    lengths=s.lengths,
                    seed=seed,
                )
                for horizon, best in zip(s.horizons, chosen, strict=True)
                for seed in s.seeds
            ),
        ]

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


STUDY = Drift
