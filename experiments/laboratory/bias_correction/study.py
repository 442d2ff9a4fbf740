"""Adam and RMSProp with momentum, with and without the correction of their averages' start from zero."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from experiments.errors import UserError
from experiments.jobs import Job, Result
from experiments.laboratory.bias_correction.analysis import analyse
from experiments.laboratory.bias_correction.figure import alternative, caption, draw
from experiments.laboratory.bias_correction.findings import findings
from experiments.laboratory.bias_correction.moments import VARIANTS
from experiments.laboratory.bias_correction.runs import trained
from experiments.laboratory.bias_correction.tables import TERMS, tables
from experiments.laboratory.digits import refuse_others
from experiments.laboratory.schemas import BiasCorrectionConfig
from experiments.laboratory.terms import DIVERGED, intervals
from experiments.schemas.run import Config
from experiments.study import Outcome, Study


class BiasCorrection(Study[BiasCorrectionConfig]):
    title = "Bias correction"
    question = "Is bias correction what makes Adam better than RMSProp with momentum?"
    source = "McAllester, TTIC 31230, SGD, Momentum, RMSProp, Adam: the guess that it is; Kingma & Ba 2015, section 6.4"
    reads = ("data", "model")

    def check(self) -> None:
        super().check()
        if self.settings.warmups[0] != 0:
            raise UserError(f"study.warmups={self.settings.warmups} must begin with 0, no warm-up")

    def jobs(self, config: Config, known: Sequence[Result]) -> list[Job]:
        refuse_others(config)
        settings = self.settings
        return [
            self.measurement(
                config,
                trained,
                cost=settings.epochs,
                variant=variant,
                warmup=warmup,
                lr=settings.lr * 2**octave,
                seed=seed,
                batch_size=settings.batch_size,
                epochs=settings.epochs,
                beta1=settings.betas[0],
                beta2=settings.betas[1],
                eps=settings.eps,
            )
            for variant, warmup, octave, seed in product(VARIANTS, settings.warmups, settings.octaves, settings.seeds)
        ]

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


STUDY = BiasCorrection
