"""Curvature, noise and drift of the true gradient, at some points of a run."""

from __future__ import annotations

import dataclasses
import shlex
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.laboratory.along import along, looked_at
from experiments.laboratory.largest_batch.population import flat, gradient, sharpness, variance
from experiments.laboratory.problem import composed
from experiments.schemas.optimizer import BatchInvariantAdamConfig

START = 0.1  # of the run, where the first look is, or where the warm-up ends


def look(
    problem: str,
    overrides: str,
    lr: float,
    batch_size: int,
    warmup: int,
    examples: int,
    looks: int,
    longest: int,
    sample: int | None,
    seed: int,
) -> list[dict[str, Any]]:
    """At so many points along the run of an optimizer, over the training set or a sample of it:

    sharpness    the largest eigenvalue of P^-1 H, with P = sqrt(s) + eps of the optimizer
    plain, scaled:
        signal   ||g||^2, or g^T P^-1 g
        trace    tr Sigma of per-example gradients, or tr P^-1 Sigma
        drift    ||g(E+n) - g(E)||^2 for n of `lengths`, or the same in P^-1

    What is in P^-1 is of elements that have had a gradient: not of the embedding of a character yet to come, whose P
    is eps alone. The noise of a sample of n examples adds trace / n to its signal.
    """
    optimizer = dataclasses.replace(composed(*shlex.split(overrides)).optimizer, lr=lr)
    assert isinstance(optimizer, BatchInvariantAdamConfig)
    lengths = lengths_of(batch_size, longest)
    starts = starts_of(examples, looks, lengths[-1], batch_size, warmup)
    counts = sorted({start + n for start in starts for n in (0, *lengths)})
    gradients: dict[int, Tensor] = {}
    found: dict[int, dict[str, Any]] = {}
    weights: dict[int, dict[str, Tensor]] = {}
    for count, data, model, step in along(problem, optimizer, batch_size, warmup, seed, counts):
        copy, examined = looked_at(problem, seed, model), data.train if sample is None else data.train.spread(sample)
        gradients[count] = gradient(copy, examined)
        if count in starts:
            second_moment = flat([step.state[p]["exp_avg_sq"] for p in model.parameters()])
            scale = torch.where(second_moment > 0, second_moment.sqrt() + optimizer.eps, torch.inf)
            weights[count] = {"plain": torch.ones_like(scale), "scaled": 1 / scale}
            spread = variance(copy, examined)
            found[count] = {"examples": count, "lengths": lengths, "sharpness": sharpness(copy, examined, scale)}
            for name, weight in weights[count].items():
                signal = float(weight @ gradients[count].square())
                found[count][name] = {"signal": signal, "trace": float(weight @ spread)}
    for start in starts:
        for name, weight in weights[start].items():
            moved = [float(weight @ (gradients[start + n] - gradients[start]).square()) for n in lengths]
            found[start][name]["drift"] = moved
    return list(found.values())


def lengths_of(batch_size: int, longest: int) -> list[int]:
    """Counts of examples over which drift is measured: the batch size, and twice as many up to the longest."""
    lengths = [batch_size]
    while 2 * lengths[-1] <= longest:
        lengths.append(2 * lengths[-1])
    return lengths


def starts_of(examples: int, looks: int, longest: int, batch_size: int, warmup: int) -> list[int]:
    """Log-spaced, in whole batches, the last of them such that the longest drift is within the run."""
    last = examples - longest
    spaced = np.geomspace(max(min(max(START * examples, warmup), last), batch_size), max(last, batch_size), looks)
    return sorted({round(count / batch_size) * batch_size for count in spaced})
