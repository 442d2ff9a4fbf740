"""SGD with momentum as a running average in examples, against torch's: on a noisy quadratic, and on the digits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import product

from experiments.errors import UserError
from experiments.jobs import Job, Result
from experiments.laboratory.schemas import SGDMomentumConfig
from experiments.laboratory.sgd_momentum.analysis import POSITIONS, SCALINGS, analyse, tuned_lr
from experiments.laboratory.sgd_momentum.figure import alternative, caption, draw
from experiments.laboratory.sgd_momentum.findings import findings
from experiments.laboratory.sgd_momentum.noisy_quadratic import METHODS, descend, difference, total_effect
from experiments.laboratory.sgd_momentum.tables import TERMS, tables
from experiments.record import Record
from experiments.schemas.optimizer import OptimizerConfig
from experiments.schemas.run import Config
from experiments.study import OF_RUNS, Outcome, Study, default_optimizer

COMPARED_STEPS, COMPARED_REPLICAS = 1000, 20  # of two methods on one stream: where they differ at all, it shows at once


class SGDMomentum(Study[SGDMomentumConfig]):
    title = "SGD with momentum"
    question = "What does momentum do to SGD, in torch's units and in examples?"
    source = (
        "McAllester, TTIC 31230, SGD, Momentum, RMSProp, Adam: momentum is a running average, lr = B lr0 / N_g, and "
        "one example moves the parameters by lr0 g in total; debiasing and dampening change only the warm-up; Mandt et "
        "al. 2017, arXiv:1704.04289: the stationary variance"
    )
    reads = OF_RUNS

    def check(self) -> None:
        super().check()
        settings = self.settings
        if settings.tuning_batch_size not in settings.batch_sizes or len(settings.batch_sizes) < 2:
            raise UserError(
                f"study.batch_sizes={settings.batch_sizes} must be two or more, and have study.tuning_batch_size="
                f"{settings.tuning_batch_size} among them"
            )
        if settings.informative[-1] != 1 or settings.informative[0] <= 0:
            raise UserError(f"study.informative={settings.informative} must be shares above 0, the last of them 1")
        for name in ("batch_sizes", "informative", "lr_multipliers"):
            if (values := getattr(settings, name)) != sorted(values):
                raise UserError(f"study.{name}={values} must be in ascending order")
        if settings.lr * max(settings.batch_sizes) > 1:
            raise UserError(
                f"study.lr={settings.lr} at B = {max(settings.batch_sizes)} is a step beyond the minimum of the "
                f"quadratic: at most {1 / max(settings.batch_sizes):g}"
            )

    def jobs(self, config: Config, known: Sequence[Result]) -> list[Job]:
        """First the quadratic, and the digits over learning rates; then the digits over batch sizes, at the best."""
        if config.data.name != "digits":
            raise UserError(f"data={config.data.name}: what sgd_momentum says is of the digits; leave data= away")
        settings = self.settings
        jobs = [job for seed in settings.seeds for job in self._quadratic(config, seed)]
        jobs += [
            self.measurement(
                config,
                total_effect,
                method=method,
                batch_size=settings.tuning_batch_size,
                mixed=mixed,
                horizon=settings.horizon,
                horizons=POSITIONS,
            )
            for method in METHODS
            for mixed in (False, True)
        ]
        default = default_optimizer("batch_invariant_sgd")
        for multiplier in settings.lr_multipliers:
            optimizer = self._at(default, default.lr * multiplier)
            jobs += [
                self.training(config, optimizer, settings.tuning_batch_size, seed, stage="tuning")
                for seed in settings.seeds
            ]
        records = [result for result in known if isinstance(result.found, Record)]
        return [*jobs, *(self._digits(config, tuned_lr(records)) if records else [])]

    def _quadratic(self, config: Config, seed: int) -> list[Job]:
        settings, home = self.settings, self.settings.tuning_batch_size
        examples = settings.time_constants / settings.lr
        common = {
            "tuned_batch_size": home,
            "lr": settings.lr,
            "horizon": settings.horizon,
            "replicas": settings.replicas,
            "seed": seed,
        }
        runs = {(method, home, 1.0, round(examples / home)) for method in METHODS}
        runs |= {("heavy_ball", size, 1.0, round(examples / size)) for size in settings.batch_sizes}
        # In torch's units it takes as many steps at every batch size, not as many examples.
        runs |= {("torch", size, 1.0, round(examples / home)) for size in settings.batch_sizes}
        runs |= {("ewma", home, share, round(examples / share / home)) for share in settings.informative}
        jobs: list[Job] = [
            self.measurement(
                config,
                descend,
                cost=steps / 1000,
                method=method,
                batch_size=size,
                informative=share,
                steps=steps,
                **common,
            )
            for method, size, share, steps in sorted(runs)
        ]
        return jobs + [
            self.measurement(
                config,
                difference,
                methods="torch+ewma",
                batch_size=size,
                lr=settings.lr,
                horizon=settings.horizon,
                steps=COMPARED_STEPS,
                replicas=COMPARED_REPLICAS,
                seed=seed,
            )
            for size in settings.batch_sizes
        ]

    def _digits(self, config: Config, lr: float) -> list[Job]:
        settings, jobs = self.settings, []
        defaults = {method: default_optimizer(method) for method in set(SCALINGS.values())}
        for (scaling, method), fraction in product(SCALINGS.items(), settings.lr_fractions):
            optimizer = self._at(defaults[method], lr * fraction)
            for size in settings.batch_sizes:
                # torch's lr as it is: as if it had been tuned at this batch size.
                own = dataclasses.replace(optimizer, batch_size=size) if scaling == "fixed" else optimizer
                jobs += [
                    self.training(config, own, size, seed, stage="comparison", scaling=scaling, fraction=fraction)
                    for seed in settings.seeds
                ]
        return list(jobs)

    def _at(self, optimizer: OptimizerConfig, lr: float) -> OptimizerConfig:
        return dataclasses.replace(optimizer, lr=lr, batch_size=self.settings.tuning_batch_size)

    def outcome(self, results: Sequence[Result]) -> Outcome:
        analysis = analyse(self.settings, results)
        return Outcome(
            tables=tables(analysis),
            findings=findings(analysis),
            draw=lambda theme: draw(analysis, theme),
            caption=caption(analysis),
            alternative=alternative(analysis),
            terms=TERMS,
        )


STUDY = SGDMomentum
