"""Curvature, noise and drift of the true gradient, at some points of a run."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn

import gradstats
from experiments.data import Split
from experiments.estimate import Array
from experiments.laboratory.along import along, looked_at
from experiments.laboratory.problem import backward, composed
from experiments.schemas.optimizer import BatchInvariantAdamConfig

START = 0.1  # of the run, where the first look is
PRECISION = 1e-3  # of an eigenvalue
ITERATIONS = 1000  # of Lanczos, at most


def look(
    problem: str,
    overrides: str,
    lr: float,
    batch_size: int,
    warmup: int,
    examples: int,
    looks: int,
    longest: int,
    seed: int,
) -> list[dict[str, Any]]:
    """At so many points along the run of an optimizer, over the training set:

    sharpness    the largest eigenvalue of P^-1 H, with P = sqrt(s) + eps of the optimizer
    plain, scaled:
        signal   ||g||^2, or g^T P^-1 g
        trace    tr Sigma of per-example gradients, or tr P^-1 Sigma
        drift    ||g(E+n) - g(E)||^2 for n of `lengths`, or the same in P^-1
    """
    optimizer = dataclasses.replace(composed(*shlex.split(overrides)).optimizer, lr=lr)
    assert isinstance(optimizer, BatchInvariantAdamConfig)
    lengths = lengths_of(batch_size, longest)
    starts = starts_of(examples, looks, lengths[-1], batch_size)
    counts = sorted({start + n for start in starts for n in (0, *lengths)})
    gradients: dict[int, Tensor] = {}
    found: dict[int, dict[str, Any]] = {}
    weights: dict[int, dict[str, Tensor]] = {}
    for count, data, model, step in along(problem, optimizer, batch_size, warmup, seed, counts):
        copy = looked_at(problem, seed, model)
        gradients[count] = gradient(copy, data.train)
        if count in starts:
            scale = flat([step.state[p]["exp_avg_sq"].sqrt() + optimizer.eps for p in model.parameters()])
            weights[count] = {"plain": torch.ones_like(scale), "scaled": 1 / scale}
            spread = variance(copy, data.train)
            found[count] = {"examples": count, "lengths": lengths, "sharpness": sharpness(copy, data.train, scale)}
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


def starts_of(examples: int, looks: int, longest: int, batch_size: int) -> list[int]:
    """Log-spaced, in whole batches, the last of them such that the longest drift is within the run."""
    last = examples - longest
    spaced = np.geomspace(max(min(START * examples, last), batch_size), max(last, batch_size), looks)
    return sorted({round(count / batch_size) * batch_size for count in spaced})


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """In float64, in which they are summed."""
    return torch.cat([t.detach().flatten() for t in tensors]).double()


def gradient(model: nn.Module, split: Split) -> Tensor:
    backward(model, split.x, split.y)
    return flat([p.grad for p in model.parameters() if p.grad is not None])


def variance(model: nn.Module, split: Split) -> Tensor:
    """Of per-example gradients, for each element."""
    found = gradstats.compute(model, F.cross_entropy, split.x, split.y, statistics=["variance"]).variance
    return flat([found[name] for name, _ in model.named_parameters()])


def sharpness(model: nn.Module, split: Split, scale: Tensor) -> float:
    """The largest eigenvalue of P^-1/2 H P^-1/2, which is that of P^-1 H, by Lanczos' iteration on products of the
    Hessian with vectors: it needs fewer of them than the power iteration, and finds the largest, not the longest."""
    parameters = list(model.parameters())
    loss = F.cross_entropy(model(split.x), split.y)
    slopes = torch.autograd.grad(loss, parameters, create_graph=True)
    slope = torch.cat([g.flatten() for g in slopes])
    root = scale.rsqrt()

    def product(vector: Array) -> Array:
        direction = root * torch.from_numpy(np.asarray(vector, dtype=float).ravel())
        curved = torch.autograd.grad(slope, parameters, direction.to(slope.dtype), retain_graph=True)
        turned: Array = (root * flat(curved)).numpy()
        return turned

    size = len(scale)
    hessian = LinearOperator((size, size), matvec=product, dtype=np.float64)
    start = np.random.default_rng(0).normal(size=size)
    (largest,) = eigsh(hessian, k=1, which="LA", v0=start, tol=PRECISION, maxiter=ITERATIONS, return_eigenvectors=False)
    return float(largest)
