"""From full-batch descent to Adam: ours on torch's curves, and fewer steps at similar time with each method."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.errors import UserError
from experiments.jobs import Job, Result
from experiments.laboratory.adam_and_friends.analysis import analyse, tuned
from experiments.laboratory.adam_and_friends.figure import alternative, caption, draw
from experiments.laboratory.adam_and_friends.findings import findings
from experiments.laboratory.adam_and_friends.race import CALM, METHODS, SIDES, race
from experiments.laboratory.adam_and_friends.tables import TERMS, tables
from experiments.laboratory.schemas import AdamAndFriendsConfig
from experiments.schemas.data import ArraysConfig
from experiments.schemas.model import MLPConfig
from experiments.schemas.run import Config
from experiments.study import Outcome, Study


class AdamAndFriends(Study[AdamAndFriendsConfig]):
    title = "Adam and its friends"
    question = "Do ours follow torch's optimizers exactly, and does each method need fewer steps at similar time?"
    source = (
        "McAllester, TTIC 31230, SGD, Momentum, RMSProp, Adam: the sequence of methods; an optimizer is better if it "
        "takes fewer steps at similar time; Kingma & Ba 2015: Adam joins momentum and RMSProp"
    )
    reads = ("data", "model")

    def check(self) -> None:
        super().check()
        settings = self.settings
        if len(settings.lr_multipliers) < 3 or settings.lr_multipliers != sorted(settings.lr_multipliers):
            raise UserError(f"study.lr_multipliers={settings.lr_multipliers} must be three or more, in ascending order")
        if set(settings.tuning_seeds) & set(settings.seeds):
            raise UserError(
                f"study.tuning_seeds={settings.tuning_seeds} and study.seeds={settings.seeds} have seeds in common"
            )
        if settings.steps % settings.every:
            raise UserError(f"study.every={settings.every} must divide study.steps={settings.steps}")

    def jobs(self, config: Config, known: Sequence[Result]) -> list[Job]:
        """Torch's methods over their learning rates, and then all sides at the best of these, with other seeds; in
        float64 at a smaller one."""
        settings = self.settings
        tuning = [
            self._race(config, method, "torch", METHODS[method].lr * multiplier, seed)
            for method in METHODS
            for multiplier in settings.lr_multipliers
            for seed in settings.tuning_seeds
        ]
        if not known:
            return tuning
        rates = tuned(settings, known)
        return tuning + [
            self._race(config, method, side, rates[method] * share, seed, double)
            for method in METHODS
            for sides, share, double in ((SIDES, 1.0, False), (("torch", "ours"), CALM, True))
            for side in sides
            for seed in settings.seeds
        ]

    def _race(self, config: Config, method: str, side: str, lr: float, seed: int, double: bool = False) -> Job:
        data, model, settings = config.data, config.model, self.settings
        if not isinstance(data, ArraysConfig) or not isinstance(model, MLPConfig):
            raise UserError(
                f"data={config.data.name} with model={config.model.name}: adam_and_friends trains model=mlp on arrays "
                "of examples, as data=digits"
            )
        return self.measurement(
            config,
            race,
            cost=20.0 if METHODS[method].full_batch else 1.0,
            method=method,
            side=side,
            lr=lr,
            batch_size=settings.batch_size,
            steps=settings.steps,
            every=settings.every,
            seed=seed,
            data=data.name,
            path=data.path,
            test_fraction=data.test_fraction,
            split_seed=data.split_seed,
            widths="x".join(map(str, model.widths)),
            normalisation=str(model.normalisation),
            dropout=model.dropout,
            double=double,
        )

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


STUDY = AdamAndFriends
