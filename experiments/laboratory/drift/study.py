"""How fast the true gradient changes along training, against the noise of its estimates: which average is best?"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

from experiments.cube import Cube, cube
from experiments.errors import UserError
from experiments.jobs import Job, Result
from experiments.laboratory.drift import figure
from experiments.laboratory.drift.findings import KINDS, Found, findings, tuned
from experiments.laboratory.drift.follow import beta_of, follow, lengths_of
from experiments.laboratory.drift.tables import tables
from experiments.laboratory.problem import data_of, problem_of
from experiments.laboratory.schemas import DriftConfig
from experiments.schedule import budget
from experiments.schemas.model import MLPConfig
from experiments.schemas.optimizer import BatchInvariantAdamConfig
from experiments.schemas.run import Config, Decay
from experiments.study import Outcome, Study, default_optimizer


class Drift(Study[DriftConfig]):
    title = "Drift of the gradient against its noise"
    question = "How many examples may an average of gradients remember before drift outweighs the noise it takes away?"
    source = (
        "McAllester, TTIC 31230, SGD, Momentum, RMSProp, Adam: a running average estimates the gradient because it "
        "drifts slowly compared with its noise"
    )

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
        followed = [result for result in results if "phases" in result.coordinates]
        groups = followed[0].found["groups"]
        first = next(iter(groups.values()))
        B = followed[0].coordinates["batch_size"]
        assert isinstance(B, int)
        found = Found(
            self.settings,
            batch_size=B,
            loss=losses(results),
            levels=cube(followed, ["seed", "horizon"], lambda f: each(f, lambda p: [p["signal"], p["noise"]])).values,
            curves=cube(followed, ["seed", "horizon"], lambda f: each(f, lambda p: [p[kind] for kind in KINDS])).values,
            groups=list(groups),
            lengths=lengths_of(B, self.settings.lengths),
            bounds=[(a, b) for a, b in (phase["examples"] for phase in first)],
        )
        return Outcome(
            tables=tables(found),
            findings=findings(found),
            draw=lambda theme: figure.draw(found, theme),
            caption=figure.caption(found),
            alternative=figure.alternative(found),
            terms={
                "Drift": "||g(E+n) - g(E)||^2 of the gradient g over the training set, n examples apart.",
                "Noise": "tr Sigma, the trace of the covariance of per-example gradients over the training set; a "
                "batch of B has tr Sigma / B of it.",
                "Closest": "The horizon N, rho = 1 - 1/N for each example, at which the running average of the "
                "batches' gradients has the least squared distance to the gradient over the training set.",
                "In units of noise": "Every element of the gradient over the standard deviation of its per-example "
                "gradients, which is about how Adam scales them.",
                "Intervals": f"95% bootstrap over {len(self.settings.seeds)} seeds, widened where they are few.",
            },
        )


def each(found: dict[str, Any], value: Callable[[dict[str, Any]], Any]) -> list[list[Any]]:
    """Of every phase of every group."""
    return [[value(phase) for phase in phases] for phases in found["groups"].values()]


def losses(results: Sequence[Result]) -> Cube:
    """Final training losses (S, horizon, lr); a run that diverged has its first."""
    trained = [result for result in results if "multiplier" in result.coordinates]
    return cube(trained, ["seed", "horizon", "multiplier"], attrgetter("final_train_loss"))


STUDY = Drift
