"""Running averages on noisy data: the wrong start, the noise that is left, and the lag behind a moving signal."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.errors import UserError
from experiments.jobs import Job, Result
from experiments.laboratory.running_averages.analysis import analyse
from experiments.laboratory.running_averages.figure import alternative, caption, draw
from experiments.laboratory.running_averages.findings import findings
from experiments.laboratory.running_averages.smoothing import measure, trace, window
from experiments.laboratory.running_averages.tables import TERMS, tables
from experiments.laboratory.schemas import RunningAveragesConfig
from experiments.schemas.run import Config
from experiments.study import Outcome, Study

SMALLEST_HORIZON = 8  # of which the first quarter is two examples: below it nothing could differ there


class RunningAverages(Study[RunningAveragesConfig]):
    title = "Running averages"
    question = "What does a running average cost at its start, how much noise does it leave, and how far does it lag?"
    source = (
        "McAllester, TTIC 31230, SGD, Momentum, RMSProp, Adam: the running average with N = min(t, N), and momentum as "
        "one; Kingma & Ba 2015, section 3: an average from zero is wrong by the factor 1 - beta^t"
    )
    reads = ()

    def check(self) -> None:
        super().check()
        settings = self.settings
        if settings.shown not in settings.horizons:
            raise UserError(f"study.shown={settings.shown} must be one of study.horizons={settings.horizons}")
        if min(settings.horizons) < SMALLEST_HORIZON:
            raise UserError(f"study.horizons={settings.horizons} must be {SMALLEST_HORIZON} examples or more")
        if settings.examples < (least := 2 * window(max(settings.horizons))):
            raise UserError(
                f"study.examples={settings.examples}, the second half of which is the settled phase, must be at least "
                f"{least} for a horizon of {max(settings.horizons)}"
            )

    def jobs(self, config: Config, known: Sequence[Result]) -> list[Job]:
        settings = self.settings
        data = {
            "examples": settings.examples,
            "period": settings.period,
            "offset": settings.offset,
            "noise": settings.noise,
        }
        jobs: list[Job] = [
            self.measurement(config, measure, horizon=horizon, draws=settings.draws, seed=seed, **data)
            for horizon in settings.horizons
            for seed in settings.seeds
        ]
        return [*jobs, self.measurement(config, trace, horizon=settings.shown, seed=settings.seeds[0], **data)]

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


STUDY = RunningAverages
