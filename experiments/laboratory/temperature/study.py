"""The learning rate as a temperature: how far noise keeps from a minimum, annealing, and cycles that explore."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from experiments.errors import UserError
from experiments.jobs import Coordinate, Job, Result
from experiments.laboratory.problem import problem_of
from experiments.laboratory.schemas import TemperatureConfig
from experiments.laboratory.temperature.analysis import analyse, equal_temperatures
from experiments.laboratory.temperature.figure import alternative, caption, draw
from experiments.laboratory.temperature.findings import findings
from experiments.laboratory.temperature.runs import anneal, snapshots
from experiments.laboratory.temperature.tables import TERMS, tables
from experiments.laboratory.temperature.wells import quadratic_variance, well_at_minimum, well_excess
from experiments.laboratory.terms import intervals
from experiments.optimizers import OURS
from experiments.schemas.run import Config
from experiments.study import Outcome, Study, default_optimizer


class Temperature(Study[TemperatureConfig]):
    title = "Learning rate as temperature"
    question = "Is eta/B the temperature of stochastic gradient descent: at rest, in annealing, and in cycles?"
    source = (
        "McAllester, TTIC 31230: learning rate as temperature; Smith et al. 2018, Don't Decay the Learning Rate, "
        "Increase the Batch Size; Huang et al. 2017, Snapshot Ensembles"
    )
    reads = ("data", "model", "train.batch_size", "train.warmup_examples")

    def check(self) -> None:
        super().check()
        s = self.settings
        for key, rates, sizes in (
            ("rates", s.rates, s.batch_sizes),
            ("well_rates", s.well_rates, s.well_batch_sizes),
        ):
            if not equal_temperatures(rates, sizes):
                raise UserError(f"study.{key}={rates}: no two have the same ratio to a batch size in {sizes}")
        if (largest := max(s.rates) * max(s.curvatures)) >= 2:
            raise UserError(f"study.rates: eta h = {largest:g} is not below 2, where nothing is stationary")
        if not 2 <= s.members <= s.cycles:
            raise UserError(f"study.members={s.members} must be from 2 to study.cycles={s.cycles}")
        if s.stages < 2 or s.factor < 2:
            raise UserError(f"study.stages={s.stages} and study.factor={s.factor} must be 2 or more")

    def jobs(self, config: Config, known: Sequence[Result]) -> list[Job]:
        s, problem = self.settings, problem_of(config)
        B, warmup = config.train.batch_size, config.train.warmup_examples
        if s.stage % (s.points * B * s.factor ** (s.stages - 1)):
            raise UserError(
                f"study.stage={s.stage} must be a multiple of study.points={s.points} times the largest batch, "
                f"{B * s.factor ** (s.stages - 1)}"
            )
        if s.cycle % B or min(s.cycle, s.stage) <= warmup:
            raise UserError(
                f"study.cycle={s.cycle} must be a multiple of train.batch_size={B}, and like study.stage more than "
                f"train.warmup_examples={warmup}"
            )
        method = default_optimizer(s.method)
        if type(method) not in OURS:
            raise UserError(f"study.method={s.method}: schedules in examples need one of ours, as batch_invariant_sgd")
        jobs: list[Job] = [self.measurement(config, well_at_minimum, problem=problem, penalty=s.penalty, cost=3)]
        for seed in s.seeds:
            jobs += [
                self.measurement(
                    config,
                    quadratic_variance,
                    rate=rate,
                    batch_size=size,
                    curvature=h,
                    noise=s.noise,
                    repetitions=s.repetitions,
                    seed=seed,
                )
                for h, rate, size in product(s.curvatures, s.rates, s.batch_sizes)
            ]
            jobs += [
                self.measurement(
                    config,
                    well_excess,
                    cost=0.2 / rate,
                    problem=problem,
                    penalty=s.penalty,
                    rate=rate,
                    batch_size=size,
                    seed=seed,
                )
                for rate, size in product(s.well_rates, s.well_batch_sizes)
            ]
            for multiplier in s.lr_multipliers:
                run: dict[str, Coordinate] = {
                    "problem": problem,
                    "method": s.method,
                    "lr": method.lr * multiplier,
                    "warmup": warmup,
                    "seed": seed,
                }
                jobs += [
                    self.measurement(
                        config,
                        anneal,
                        cost=s.stages * s.stage / 8192,
                        decays=decays,
                        grows=grows,
                        factor=s.factor,
                        stages=s.stages,
                        stage=s.stage,
                        batch_size=B,
                        points=s.points,
                        **run,
                    )
                    for decays, grows in product((False, True), repeat=2)
                ]
                jobs.append(
                    self.measurement(
                        config,
                        snapshots,
                        cost=3 * s.cycles * s.cycle / 8192,
                        cycles=s.cycles,
                        members=s.members,
                        cycle=s.cycle,
                        batch_size=B,
                        **run,
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
            terms=TERMS | intervals(len(self.settings.seeds)),
        )


STUDY = Temperature
