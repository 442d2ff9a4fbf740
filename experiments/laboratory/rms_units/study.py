"""RMSProp's step g/sigma, and g/sigma^2, where weights or loss are counted in other units."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

from experiments.errors import UserError
from experiments.jobs import Job, Result
from experiments.laboratory.digits import refuse_others
from experiments.laboratory.rms_units.analysis import EXPONENTS, UNITS, analyse
from experiments.laboratory.rms_units.figure import alternative, caption, draw
from experiments.laboratory.rms_units.findings import findings
from experiments.laboratory.rms_units.runs import METHODS, deviation, trained
from experiments.laboratory.rms_units.tables import TERMS, tables
from experiments.laboratory.schemas import RmsUnitsConfig
from experiments.laboratory.terms import DIVERGED, intervals
from experiments.schemas.run import Config
from experiments.study import Outcome, Study, default_optimizer


class RmsUnits(Study[RmsUnitsConfig]):
    title = "The unit of a step"
    question = "Which step stays the same in other units of the weights or the loss, and which trains better?"
    source = "McAllester, TTIC 31230, SGD, Momentum, RMSProp, Adam: by its units the step should be g/sigma^2"
    reads = ("data", "model")

    def check(self) -> None:
        super().check()
        settings = self.settings
        for name in ("weight_scale", "loss_scale"):
            if getattr(settings, name) <= 1:
                raise UserError(f"study.{name}={getattr(settings, name):g} must be above 1, or no unit changes")

    def jobs(self, config: Config, known: Sequence[Result]) -> list[Job]:
        refuse_others(config)
        settings = self.settings
        scales = dict(zip(UNITS, ((1.0, 1.0), (settings.weight_scale, 1.0), (1.0, settings.loss_scale)), strict=True))
        jobs: list[Job] = []
        for exponent, units in product(EXPONENTS, UNITS):
            lr = default_optimizer(METHODS[exponent]).lr
            weight_scale, loss_scale = scales[units]
            common: dict[str, Any] = {
                "exponent": exponent,
                "units": units,
                "weight_scale": weight_scale,
                "loss_scale": loss_scale,
                "batch_size": settings.batch_size,
                "warmup": settings.warmup,
            }
            jobs += [
                self.measurement(
                    config,
                    trained,
                    settings.epochs,
                    **common,
                    lr=lr * 2**octave,
                    floor=floor,
                    seed=seed,
                    epochs=settings.epochs,
                )
                for octave, floor, seed in product(settings.octaves, settings.floors, settings.seeds)
            ]
            if units == UNITS[0]:
                continue
            jobs += [
                self.measurement(
                    config,
                    deviation,
                    **common,
                    lr=lr,
                    floor=settings.floor,
                    floor_in_units=floor_in_units,
                    seed=seed,
                    steps=settings.steps,
                )
                for floor_in_units, seed in product((True, False), settings.seeds)
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
            terms=TERMS | intervals(len(self.settings.seeds), "tuning is repeated") | DIVERGED,
        )


STUDY = RmsUnits
