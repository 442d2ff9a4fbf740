"""Results of jobs on a full grid of coordinates, as one array."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.estimate import Array
from experiments.jobs import Coordinate, Result


@dataclass(frozen=True)
class Cube:
    """values has an axis for each coordinate, in this order, and then those of a single value."""

    axes: dict[str, tuple[Coordinate, ...]]
    values: Array

    def numbers(self, axis: str) -> tuple[float, ...]:
        """The values of a coordinate that is a number. Raises ValueError if it is not."""
        return tuple(np.array(self.axes[axis], dtype=float).tolist())

    def at(self, **coordinates: Coordinate) -> Array:
        """The part where some coordinates have these values; their axes go."""
        index: list[Any] = [slice(None)] * self.values.ndim
        for i, (name, values) in enumerate(self.axes.items()):
            if name in coordinates:
                index[i] = values.index(coordinates[name])
        return self.values[tuple(index)]


def cube(results: Sequence[Result], axes: Sequence[str], value: Callable[[Any], Any], **where: Coordinate) -> Cube:
    """value(result.found) of every result whose coordinates are as in `where`; coordinates in order of appearance.

    Raises ValueError unless each cell of the grid has exactly one result.
    """
    chosen = [r for r in results if all(r.coordinates.get(name) == wanted for name, wanted in where.items())]
    found = {tuple(r.coordinates[name] for name in axes): value(r.found) for r in chosen}
    levels = {name: tuple(dict.fromkeys(key[i] for key in found)) for i, name in enumerate(axes)}
    shape = [len(values) for values in levels.values()]
    if len(found) != len(chosen) or len(found) != np.prod(shape):
        raise ValueError(f"{len(chosen)} results are no grid of {dict(zip(axes, shape, strict=True))}")
    cells = [found[key] for key in _product(list(levels.values()))]
    values = np.array(cells, dtype=float)
    return Cube(levels, values.reshape(*shape, *values.shape[1:]))


def _product(levels: list[tuple[Coordinate, ...]]) -> list[tuple[Coordinate, ...]]:
    keys: list[tuple[Coordinate, ...]] = [()]
    for values in levels:
        keys = [(*key, v) for key in keys for v in values]
    return keys
