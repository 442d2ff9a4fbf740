"""The tables of adam_and_friends."""

from __future__ import annotations

from experiments.documents import Cell, Table
from experiments.laboratory.adam_and_friends.analysis import SHOWN, Analysis, median
from experiments.laboratory.adam_and_friends.race import METHODS


def tables(analysis: Analysis) -> list[Table]:
    return [_to_target(analysis), _tuning(analysis)]


def _to_target(analysis: Analysis) -> Table:
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
