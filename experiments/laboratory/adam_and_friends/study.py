"""From full-batch descent to Adam: ours on torch's curves, and fewer steps at similar time with each method."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.documents import Cell, Table
from experiments.errors import UserError
from experiments.jobs import Job, Result
from experiments.laboratory.adam_and_friends.analysis import SHOWN, Analysis, analyse, findings, median, tuned
from experiments.laboratory.adam_and_friends.figure import draw
from experiments.laboratory.adam_and_friends.race import METHODS, SIDES, race
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
        """Torch's methods over their learning rates, and then both sides at the best of these, with other seeds."""
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
            self._race(config, method, side, rates[method], seed, double)
            for method in METHODS
            for side, double in (*((side, False) for side in SIDES), ("torch", True), ("ours", True))
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
            tables=[_table(analysis), _tuning(analysis)],
            findings=findings(analysis),
            draw=lambda theme: draw(analysis, theme),
            caption=caption(self.settings),
            alternative=alternative(analysis),
            terms=TERMS,
        )


def _table(analysis: Analysis) -> Table:
    settings = analysis.settings
    rows: list[list[Cell]] = []
    for name, method in METHODS.items():
        for side in SHOWN:
            rows.append(
                [
                    f"{method.label}, {side}",
                    f"{analysis.rates[name]:.3g}",
                    median(analysis.of(analysis.reached, name, side)),
                    median(analysis.of(analysis.seconds_reached, name, side)),
                    median(1000 * analysis.of(analysis.step, name, side)),
                    median(analysis.of(analysis.loss, name, side)[:, -1]),
                ]
            )
    return Table(
        f"To a training loss of {settings.target:g} nats",
        f"lr: tuned on torch's side, {len(settings.lr_multipliers)} values in {len(settings.tuning_seeds)} seeds each, "
        f"for the fewest steps. Looks are {settings.every} steps apart. Medians over {len(settings.seeds)} other "
        "seeds, in brackets their 95% bootstrap intervals; a dash: not reached with every seed.",
        ["method", "lr", "steps", "seconds", "ms a step", "final loss"],
        rows,
        tuple(range(1, len(rows), len(SHOWN))),
    )


def _tuning(analysis: Analysis) -> Table:
    settings = analysis.settings
    return Table(
        "Tuning",
        f"Mean steps to {settings.target:g} nats over {len(settings.tuning_seeds)} seeds, by lr in units of each "
        f"method's first guess; a run that misses it within {settings.steps:,} steps counts {2 * settings.steps:,}.",
        ["method", "first guess", *(f"x {multiplier:g}" for multiplier in settings.lr_multipliers)],
        [
            [method.label, f"{method.lr:g}", *(f"{steps:.0f}" for steps in row)]
            for method, row in zip(METHODS.values(), analysis.tuning, strict=True)
        ],
        (),
    )


TERMS = {
    "At torch's values": "Ours are given torch's own arguments, and this batch size as the one of tuning: there they "
    "claim to be torch's optimizers. At other batch sizes they are not.",
    "Full-batch descent": "SGD whose batch is the training set.",
    "Forms": "torch computes a step fused, or one parameter after another: the same algorithm, rounded differently. At "
    "the edge of stability a rounding error grows to where curves part.",
    "Seconds": "Of processor time, in steps only: gathering the batch, forward, backward and optimizer. Looks at the "
    "loss are left out.",
}


def caption(settings: AdamAndFriendsConfig) -> str:
    return (
        "Top: training loss against steps and against seconds, geometric mean over seeds; broad lines are torch's, "
        f"thin black ones ours on top of them; the dotted line is the target, {settings.target:g} nats. Bottom: steps "
        "and seconds to the target, hollow for torch's and filled for ours, medians with 95% intervals over "
        f"{len(settings.seeds)} seeds."
    )


def alternative(analysis: Analysis) -> str:
    numbers = "; ".join(
        f"{method.label} {median(analysis.of(analysis.reached, name)).text()} steps, "
        f"{median(analysis.of(analysis.seconds_reached, name)).text()} s"
        for name, method in METHODS.items()
    )
    return f"Training loss against steps and seconds for five methods. To the target with torch's: {numbers}."


STUDY = AdamAndFriends
