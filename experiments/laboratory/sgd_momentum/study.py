"""SGD with momentum as a running average in examples, against torch's: on a noisy quadratic, and on the digits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import product

import numpy as np

from experiments.documents import Cell, Table
from experiments.errors import UserError
from experiments.estimate import over_seeds
from experiments.jobs import Job, Result
from experiments.laboratory.schemas import SGDMomentumConfig
from experiments.laboratory.sgd_momentum.analysis import LABELS, SCALINGS, UNITS, Analysis, analyse, tuned_lr
from experiments.laboratory.sgd_momentum.figure import draw
from experiments.laboratory.sgd_momentum.findings import findings
from experiments.laboratory.sgd_momentum.noisy_quadratic import METHODS, descend, difference, total_effect
from experiments.record import Record
from experiments.schemas.optimizer import OptimizerConfig
from experiments.schemas.run import Config
from experiments.study import Outcome, Study, default_optimizer

COMPARED_STEPS, COMPARED_REPLICAS = 1000, 20  # of two methods on one stream: where they differ at all, it shows at once
POSITIONS = 5  # horizons within which a batch may come, whose total effect is measured


class SGDMomentum(Study[SGDMomentumConfig]):
    title = "SGD with momentum"
    question = "What does momentum do to SGD, in torch's units and in examples?"
    source = (
        "McAllester, TTIC 31230, SGD, Momentum, RMSProp, Adam: momentum is a running average, lr = B lr0 / N_g, and "
        "one example moves the parameters by lr0 g in total; debiasing and dampening change only the warm-up; Mandt et "
        "al. 2017, arXiv:1704.04289: the stationary variance"
    )

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
            tables=[_methods(analysis), _batch_sizes(analysis), _digits_table(analysis)],
            findings=findings(analysis),
            draw=lambda theme: draw(analysis, theme),
            caption=caption(self.settings),
            alternative=alternative(analysis),
            terms=TERMS,
        )


def _methods(analysis: Analysis) -> Table:
    settings = analysis.settings
    rows: list[list[Cell]] = []
    for method in METHODS:
        rows.append(
            [
                LABELS[method],
                over_seeds(analysis.time_to(0.5, method) * settings.lr),
                over_seeds(analysis.time_to(0.1, method) * settings.lr),
                over_seeds(analysis.variance[method] * 2 / settings.lr),
                f"{analysis.effect[method, False][1][0]:.3g}",
                f"{analysis.effect[method, False][1][-1]:.3g}",
            ]
        )
    return Table(
        f"On the quadratic, at B = {settings.tuning_batch_size} and equal total effect",
        f"Time until the mean falls to a half and to a tenth, in units of 1/lr0 = {1 / settings.lr:,.0f} examples; "
        "variance once settled, in units of lr0/2; how far the first batch moves the parameter in total, and one that "
        f"comes after {POSITIONS} horizons, in units of lr0 g. Brackets: 95% bootstrap intervals over "
        f"{len(settings.seeds)} seeds of {settings.replicas} runs each.",
        ["method", "time to 1/2", "time to 1/10", "settled variance", "effect first", "effect later"],
        rows,
        tuple(i for i, method in enumerate(METHODS) if method in ("heavy_ball", "debiased_ewma")),
    )


def _batch_sizes(analysis: Analysis) -> Table:
    settings = analysis.settings
    rows: list[list[Cell]] = []
    for i, size in enumerate(settings.batch_sizes):
        numbers = [
            over_seeds(values[:, i])
            for unit in UNITS
            for values in (
                analysis.time_by_size[unit] * settings.lr,
                analysis.variance_by_size[unit] * 2 / settings.lr,
            )
        ]
        rows.append([str(size), *numbers])
    return Table(
        "On the quadratic, over batch sizes",
        "torch: lr and momentum as they are; ours: lr0 and the horizon as they are. Time to a tenth and settled "
        "variance, in the units of the table above.",
        ["B", "time, torch", "variance, torch", "time, ours", "variance, ours"],
        rows,
        (),
    )


def _digits_table(analysis: Analysis) -> Table:
    settings = analysis.settings
    rows: list[list[Cell]] = []
    for scaling, fraction in product(SCALINGS, settings.lr_fractions):
        final = np.exp(analysis.digits[scaling, fraction][:, :, -1])
        rows.append(
            [
                LABELS[scaling],
                f"{analysis.lr * fraction:.3g}",
                over_seeds(analysis.score(scaling, fraction)),
                *(over_seeds(final[:, i]) for i in range(len(settings.batch_sizes))),
            ]
        )
    return Table(
        "On the digits, over batch sizes",
        f"Training loss at the end, with the lr tuned for the heavy ball at B = {settings.tuning_batch_size}, "
        f"{analysis.lr:.3g}, and parts of it; there all but the last are one algorithm. Score: the standard deviation "
        "over B of ln(training loss), mean over the counts of examples after 5% of the run.",
        ["method", "lr", "score", *(f"loss B={size}" for size in settings.batch_sizes)],
        rows,
        tuple(i for i, (scaling, _) in enumerate(product(SCALINGS, settings.lr_fractions)) if "ours" in scaling),
    )


TERMS = {
    "lr0": "The total effect: one example with gradient g moves the parameters by lr0 g sooner or later. In torch's "
    "units lr = B lr0 (1 - momentum).",
    "Horizon N": "Of the running average, in examples: momentum = (1 - 1/N)^B.",
    "Quadratic": "(theta - x)^2 / 2 an example, with x normal of variance 1; from theta = 1.",
    "Dampened": "torch's dampening = momentum: a running average, whose first gradient counts as a whole horizon.",
    "Near-zero gradients": "Examples that are masked, or learnt: in a batch they count for B, and have no gradient.",
}


def caption(settings: SGDMomentumConfig) -> str:
    return (
        f"Top and middle: the quadratic, N = {settings.horizon:g} examples, at B = {settings.tuning_batch_size} unless "
        "B is the axis. Distance covered: one minus the mean of theta, in units of lr0 times examples. Lines in the "
        "panel of the variance: closed form of torch's heavy ball. Near-zero gradients: both in units of what they are "
        "when all examples are informative. Bottom: training loss on the digits, geometric mean over seeds, one line "
        f"a batch size, lr at B = {settings.tuning_batch_size}. Means over {len(settings.seeds)} seeds; vertical "
        "lines are 95% intervals where larger than a point."
    )


def alternative(analysis: Analysis) -> str:
    scores = ", ".join(
        f"{LABELS[scaling]} at {fraction:g} times the tuned lr {analysis.score(scaling, fraction).mean():.2g}"
        for scaling, fraction in product(SCALINGS, analysis.settings.lr_fractions)
    )
    return (
        "Distance covered in the warm-up, total effect of a batch, settled variance and time to a tenth over batch "
        f"sizes, near-zero gradients, and learning curves on the digits. Scores over batch sizes: {scores}."
    )


STUDY = SGDMomentum
