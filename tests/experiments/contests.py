"""Results of imaginary contests, whose losses are known in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import product

import numpy as np

from experiments.config import compose_config
from experiments.jobs import Result
from experiments.laboratory.schemas import ContestConfig
from experiments.record import Record

EXAMPLES = [0, 256, 512, 1024, 2048, 4096]
FIRST = 2.0


def settings(name: str) -> ContestConfig:
    """Those of the short form."""
    study = compose_config([f"experiment=short/{name}"]).study
    assert isinstance(study, ContestConfig)
    return study


def results(
    study: ContestConfig,
    loss: Callable[[str, int], float],
    *,
    best: Callable[[str, int], float] = lambda label, B: 0.0,
    curvature: Mapping[str, float] | None = None,
    seconds: Mapping[str, float] | None = None,
    noise: float = 0.01,
) -> list[Result]:
    """Losses fall as a power to loss(label, B) at the best octave, and to more by `curvature` at others."""
    random = np.random.default_rng(0)
    found = []
    for label, B, octave, seed in product(study.contestants, study.batch_sizes, range(-2, 3), study.seeds):
        bend = (curvature or {}).get(label, 0.2)
        last = loss(label, B) * math.exp(bend * (octave - best(label, B)) ** 2 + noise * random.normal())
        curve = [FIRST * (last / FIRST) ** (n / EXAMPLES[-1]) for n in EXAMPLES]
        record = Record(
            label, label, 2.0**octave, B, seed, "", "finished", EXAMPLES, curve, [1.5 * v for v in curve], [0.0] * 6
        )
        record.seconds = (seconds or {}).get(label, 1.0) * math.exp(noise * random.normal())
        coordinates = {"contestant": label, "batch_size": B, "octave": float(octave), "seed": seed, "lr": 2.0**octave}
        found.append(Result(coordinates, record, record.seconds))
    return found
