"""The records of a study as arrays: a cell a run, a value a checkpoint.

One letter per axis: M method, L learning rate, B batch size, S seed, T checkpoint. Every loss is in nats per example.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from experiments.estimate import Array
from experiments.record import Record

# The first checkpoints compare little but the common initial model, and would pull every score towards zero.
BURN_IN = 0.05
# Below it a float32 loss is rounding, and its logarithm would decide the score.
SMALLEST_LOSS = 1e-7


@dataclass(frozen=True)
class Grid:
    """The records of a study as dense arrays; every method has the same number of learning rates."""

    methods: tuple[str, ...]
    labels: tuple[str, ...]
    lr: Array  # (M, L), ascending
    batch_sizes: tuple[int, ...]
    seeds: tuple[int, ...]
    examples: NDArray[np.int64]  # (T,)
    train_loss: Array  # (M, L, B, S, T)
    test_loss: Array  # (M, L, B, S, T)
    test_accuracy: Array  # (M, L, B, S, T)
    diverged: NDArray[np.bool_]  # (M, L, B, S)

    @property
    def late(self) -> NDArray[np.bool_]:
        """The checkpoints that count for scores: (T,)."""
        return self.examples >= BURN_IN * self.examples[-1]

    def columns(self, batch_sizes: Sequence[int]) -> list[int]:
        return [self.batch_sizes.index(size) for size in batch_sizes]

    def with_seeds(self, index: NDArray[np.int64]) -> Grid:
        return dataclasses.replace(
            self,
            seeds=tuple(self.seeds[i] for i in index),
            train_loss=self.train_loss[..., index, :],
            test_loss=self.test_loss[..., index, :],
            test_accuracy=self.test_accuracy[..., index, :],
            diverged=self.diverged[..., index],
        )


def arrange(records: Sequence[Record]) -> Grid:
    """Sort records into a grid.

    A run that diverged keeps what it recorded and counts as its initial model from there on, and no loss counts for
    more than the initial model's: so a run that broke is neither dropped nor able to decide a mean by its size.

    Raises ValueError if a cell of the grid has no record, or if methods have different numbers of learning rates.
    """
    methods = tuple(dict.fromkeys(record.method for record in records))
    labels = {record.method: record.label for record in records}
    rates = {name: sorted({record.lr for record in records if record.method == name}) for name in methods}
    counts = {name: len(values) for name, values in rates.items()}
    if len(set(counts.values())) != 1:
        raise ValueError(f"methods must have equal budgets, but their numbers of learning rates differ: {counts}")
    batch_sizes = tuple(sorted({record.batch_size for record in records}))
    seeds = tuple(sorted({record.seed for record in records}))
    finished = [set(record.examples) for record in records if record.status == "finished"]
    if not finished:
        raise ValueError("every run diverged: lower the learning rates of the study")
    examples = np.array(sorted(set.intersection(*finished)), dtype=np.int64)
    if examples[0] != 0:
        raise ValueError(f"records must begin with the initial model at 0 examples, not at {examples[0]}")

    shape = (len(methods), len(next(iter(rates.values()))), len(batch_sizes), len(seeds))
    train_loss, test_loss, test_accuracy = (np.full((*shape, len(examples)), np.nan) for _ in range(3))
    diverged = np.zeros(shape, dtype=bool)
    missing = np.ones(shape, dtype=bool)
    for record in records:
        cell = (
            methods.index(record.method),
            rates[record.method].index(record.lr),
            batch_sizes.index(record.batch_size),
            seeds.index(record.seed),
        )
        missing[cell] = False
        diverged[cell] = record.status == "diverged"
        train_loss[cell] = _on_common_counts(record.examples, record.train_loss, examples)
        test_loss[cell] = _on_common_counts(record.examples, record.test_loss, examples)
        test_accuracy[cell] = _on_common_counts(record.examples, record.test_accuracy, examples)
    if missing.any():
        m, rate, b, s = np.argwhere(missing)[0]
        raise ValueError(
            f"{missing.sum()} of {missing.size} runs have no record, among them {methods[m]} with "
            f"lr {rates[methods[m]][rate]:g}, batch size {batch_sizes[b]}, seed {seeds[s]}: run the study to its end"
        )
    return Grid(
        methods=methods,
        labels=tuple(labels[name] for name in methods),
        lr=np.array([rates[name] for name in methods]),
        batch_sizes=batch_sizes,
        seeds=seeds,
        examples=examples,
        train_loss=np.clip(train_loss, SMALLEST_LOSS, train_loss[..., :1]),
        test_loss=np.clip(test_loss, SMALLEST_LOSS, test_loss[..., :1]),
        test_accuracy=test_accuracy,
        diverged=diverged,
    )


def _on_common_counts(counts: Sequence[int], values: Sequence[float], examples: NDArray[np.int64]) -> Array:
    recorded = dict(zip(counts, values, strict=True))
    column = np.array([recorded.get(int(count), np.nan) for count in examples])
    return np.where(np.isfinite(column), column, recorded[0])
