"""Is the noise scale of one pass that of two batch sizes, and does it tell the critical batch size?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from experiments.contest.followed import FollowedContest
from experiments.errors import UserError
from experiments.jobs import Job, Result
from experiments.laboratory.noise_scale.analysis import analyse
from experiments.laboratory.noise_scale.arrivals import arrival
from experiments.laboratory.noise_scale.figure import alternative, caption, draw
from experiments.laboratory.noise_scale.findings import findings
from experiments.laboratory.noise_scale.measure import noise_along
from experiments.laboratory.noise_scale.tables import TERMS, tables
from experiments.laboratory.schemas import NoiseScaleConfig
from experiments.laboratory.terms import DIVERGED, intervals
from experiments.record import Record
from experiments.schemas.model import MLPConfig, Normalisation
from experiments.schemas.run import Config
from experiments.study import Outcome


class NoiseScaleStudy(FollowedContest[NoiseScaleConfig]):
    title = "The gradient noise scale and the critical batch size"
    question = "Does one pass give the noise scale that two batch sizes give, and does it tell the critical batch size?"
    source = (
        "McCandlish et al. 2018, arXiv:1812.06162: it does; Merrill et al. 2025, arXiv:2505.23971, doubt it; Gray et "
        "al. 2024, arXiv:2411.00999: that of normalisation layers follows the total"
    )

    def check(self) -> None:
        super().check()
        s = self.settings
        if not 0 < s.small < s.big or s.big % s.small:
            raise UserError(f"study.small={s.small} must divide study.big={s.big}, and be less")
        if s.draws < 2:
            raise UserError(f"study.draws={s.draws}: two or more, or estimates have no spread")
        if s.targets != sorted(s.targets, reverse=True):
            raise UserError(f"study.targets={s.targets} must fall, as the loss does")

    def criteria(self, record: Record) -> list[float]:
        """The loss, and examples to each target."""
        return [*super().criteria(record), *(arrival(record, target) for target in self.settings.targets)]

    def required(self) -> Sequence[str]:
        return ()

    def followed(self) -> Sequence[str]:
        return list(self.settings.contestants)

    def follow(self, config: Config, arguments: dict[str, Any]) -> Job:
        if not isinstance(config.model, MLPConfig) or config.model.normalisation is not Normalisation.layer:
            raise UserError("model.normalisation must be layer here: a claim is about normalisation layers")
        s = self.settings
        return self.measurement(config, noise_along, **arguments, draws=s.draws, small=s.small, big=s.big)

    def outcome(self, results: Sequence[Result]) -> Outcome:
        found = analyse(self.settings, results)
        return Outcome(
            tables=tables(found),
            findings=findings(found),
            draw=lambda theme: draw(found, theme),
            caption=caption(found),
            alternative=alternative(found),
            terms=TERMS | intervals(len(self.settings.seeds), "tuning is repeated") | DIVERGED,
        )


STUDY = NoiseScaleStudy
