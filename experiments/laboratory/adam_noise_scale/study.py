"""Does Adam's optimal learning rate rise with the batch size, peak at B_noise, and fall?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from experiments.contest.followed import FollowedContest
from experiments.errors import UserError
from experiments.jobs import Job, Result
from experiments.laboratory.adam_noise_scale.analysis import LAWFUL, OURS, analyse
from experiments.laboratory.adam_noise_scale.figure import alternative, caption, draw
from experiments.laboratory.adam_noise_scale.findings import findings
from experiments.laboratory.adam_noise_scale.measure import moments_along
from experiments.laboratory.adam_noise_scale.tables import TERMS, tables
from experiments.laboratory.schemas import AdamNoiseScaleConfig
from experiments.laboratory.terms import DIVERGED, intervals
from experiments.schemas.run import Config
from experiments.study import Outcome


class AdamNoiseScale(FollowedContest[AdamNoiseScaleConfig]):
    title = "The noise scale of Adam"
    question = "Does Adam's best learning rate rise as sqrt(B), peak at a B_noise that can be measured, and fall?"
    source = "Li et al. 2024, arXiv:2405.14578: lr = lr_max / (1/2 (sqrt(B_noise/B) + sqrt(B/B_noise)))"

    def check(self) -> None:
        super().check()
        s = self.settings
        if len(s.batch_sizes) < 3 or s.batch_sizes != sorted(s.batch_sizes):
            raise UserError(f"study.batch_sizes={s.batch_sizes}: three or more, rising, or no peak can be seen")
        if s.probes < 1:
            raise UserError(f"study.probes={s.probes} must be 1 or more")

    def required(self) -> Sequence[str]:
        return (*LAWFUL, OURS)

    def followed(self) -> Sequence[str]:
        return LAWFUL

    def follow(self, config: Config, arguments: dict[str, Any]) -> Job:
        return self.measurement(config, moments_along, **arguments, probes=self.settings.probes)

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


STUDY = AdamNoiseScale
