"""What depends on the number of examples seen: the learning rate, and when a run is evaluated."""

from __future__ import annotations

from math import floor

import numpy as np

from experiments.errors import UserError
from experiments.schemas.run import Decay
from gradstats.optim import Constant, Cosine, Linear, Schedule, Warmup


def learning_rate_schedule(warmup: int, total: int, decay: Decay) -> Schedule:
    """Multiplier of the learning rate: linear up to 1 over the warm-up, and then the decay over the rest of the run.

    Raises UserError if no run is left after the warm-up.
    """
    if not 0 <= warmup < total:
        raise UserError(f"train.warmup_examples={warmup} must be at least 0 and less than the run's {total} examples")
    rest = total - warmup
    following: dict[Decay, Schedule] = {
        Decay.none: Constant(),
        Decay.linear: Linear(rest),
        Decay.cosine: Cosine(rest),
    }
    return Warmup(warmup).then(following[decay])


def budget(epochs: float, examples: int, multiple: int, batch_size: int) -> int:
    """Examples to train on: the largest multiple within so many epochs.

    Raises UserError if a batch size does not divide the multiple, since runs of other batch sizes could not be
    evaluated at the same counts, and if the epochs are too few for one multiple.
    """
    if multiple % batch_size:
        raise UserError(
            f"train.batch_size={batch_size} does not divide evaluation.multiple={multiple}, "
            f"so evaluations would fall within a batch: set evaluation.multiple to a multiple of {batch_size}"
        )
    total = floor(epochs * examples / multiple) * multiple
    if total == 0:
        raise UserError(
            f"train.epochs={epochs} of {examples} examples is less than evaluation.multiple={multiple}: "
            "train for longer, or lower the multiple"
        )
    return total


def evaluation_counts(total: int, multiple: int, count: int) -> list[int]:
    """0, and `log_spaced`."""
    return [0, *log_spaced(total, multiple, count)]


def log_spaced(total: int, multiple: int, count: int) -> list[int]:
    """At most count multiples up to and with the total."""
    spaced = np.geomspace(multiple, total, count) / multiple
    return sorted({round(value) * multiple for value in spaced} | {total})


def every(interval: int, batch_size: int, total: int) -> set[int]:
    """Multiples of the interval, rounded up to whole batches, with the total."""
    step = -(-interval // batch_size) * batch_size
    return {*range(step, total, step), total}
