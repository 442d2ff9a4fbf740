"""The true gradient at every step of a run, and how well running averages of batch gradients keep up with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

import numpy as np
import torch
from torch import nn

from experiments.errors import UserError
from experiments.estimate import Array
from experiments.laboratory.problem import backward, build, loss_of
from experiments.optimizers import attach_statistics, build_optimizer
from experiments.sampler import Sampler
from experiments.schedule import learning_rate_schedule
from experiments.schemas.optimizer import BatchInvariantAdamConfig
from experiments.schemas.run import Decay
from experiments.study import default_optimizer
from gradstats.units import DebiasedEWMA, decay_of

WHOLE = "whole gradient"
IN_UNITS = "in units of the noise"
START = 0.05  # of the run, where the first phase begins


@dataclass(frozen=True)
class Trajectory:
    """At the parameters before each of T steps, of all P elements: the gradient over the training set, that of the
    batch, the variance of per-example gradients; and the elements of each layer."""

    batch_size: int
    true: Array  # (T, P)
    batch: Array  # (T, P)
    variance: Array  # (T, P)
    layers: dict[str, slice]
    loss: float  # over the training set, at the end


def beta_of(horizon: int, batch_size: int) -> float:
    """torch's beta at this batch size, of an average over so many examples."""
    return decay_of(horizon) ** batch_size


def follow(
    problem: str,
    method: str,
    lr: float,
    horizon: int,
    tuned_batch_size: int,
    batch_size: int,
    examples: int,
    warmup: int,
    phases: int,
    lengths: int,
    seed: int,
) -> dict[str, Any]:
    """groups: what `measured` says of every group of parameters in every phase, along a run of BatchInvariantAdam; and
    its final training loss.

    The run is that of experiments.train with these settings: same initial model, same examples.
    """
    followed = trajectory(problem, method, lr, horizon, tuned_batch_size, batch_size, examples, warmup, seed)
    return {"loss": followed.loss, "groups": measured(followed, phases, lengths_of(batch_size, lengths))}


def lengths_of(batch_size: int, count: int) -> list[int]:
    """Counts of examples over which drift is measured, and horizons of the averages."""
    return [batch_size * 2**i for i in range(count)]


def trajectory(
    problem: str,
    method: str,
    lr: float,
    horizon: int,
    tuned_batch_size: int,
    batch_size: int,
    examples: int,
    warmup: int,
    seed: int,
) -> Trajectory:
    data, model = build(problem, seed)
    parameters = list(model.parameters())
    adam = default_optimizer(method)
    if not isinstance(adam, BatchInvariantAdamConfig):
        raise UserError(f"study.method={method}: only a BatchInvariantAdam can be followed")
    betas = (beta_of(horizon, tuned_batch_size), adam.betas[1])
    tuned = dataclasses.replace(adam, lr=lr, betas=betas, batch_size=tuned_batch_size)
    optimizer = build_optimizer(parameters, tuned, batch_size, max_norm=None)
    statistics = attach_statistics(model, optimizer, tuned, "variance")
    assert statistics is not None
    schedule = learning_rate_schedule(warmup, examples, Decay.none)
    sampler = Sampler(len(data.train), batch_size, seed, torch.device("cpu"))
    rows: list[list[torch.Tensor]] = []
    for indices in sampler.until(examples):
        backward(model, data.train.x, data.train.y)
        row = [flat([p.grad for p in parameters]), flat([statistics.variance[p] for p in parameters])]
        backward(model, data.train.x[indices], data.train.y[indices])
        row.append(flat([p.grad for p in parameters]))
        optimizer.param_groups[0]["lr"] = lr * schedule.mean(sampler.position - batch_size, sampler.position)
        optimizer.step()
        rows.append(row)
    statistics.detach()
    true, variance, batch = (torch.stack(column).double().numpy() for column in zip(*rows, strict=True))
    return Trajectory(batch_size, true, batch, variance, layers_of(model), loss_of(model, data.train))


def flat(tensors: list[Any]) -> torch.Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def layers_of(model: nn.Module) -> dict[str, slice]:
    """Of every module with parameters of its own, its elements."""
    layers, start = {}, 0
    for name, module in model.named_modules():
        size = sum(p.numel() for p in module.parameters(recurse=False))
        if size:
            layers[f"layer {name}: {type(module).__name__}"] = slice(start, start + size)
            start += size
    return layers


def measured(followed: Trajectory, phases: int, lengths: Sequence[int]) -> dict[str, list[dict[str, Any]]]:
    """Squared norms, mean over the steps of a phase, of all parameters, of each layer, and of all in units of their
    own noise over the run, which is about how Adam sees them. Phases are log-spaced.

    signal ||g||^2; noise tr Sigma; and for each length n in examples

        drift      ||g(E+n) - g(E)||^2, None where the run ends before
        error      ||g~ - g||^2 of the running average g~ of batch gradients with horizon n
        lag        the same of the average of true gradients
        scatter    what is between these averages
    """
    B, true, steps = followed.batch_size, followed.true, len(followed.true)
    edges = [round(edge) for edge in np.geomspace(START, 1, phases + 1) * steps]
    parts: dict[str, list[tuple[slice, slice, Array, dict[str, Any]]]] = {}
    for name, columns in {WHOLE: slice(None), IN_UNITS: slice(None), **followed.layers}.items():
        parts[name] = []
        for rows in (slice(a, b) for a, b in pairwise(edges)):
            spread = followed.variance[:, columns].mean(axis=0)
            counted = 1 / np.where(spread > 0, spread, np.inf)
            weight = counted if name == IN_UNITS else np.ones_like(spread)
            parts[name].append((rows, columns, weight, {"examples": [rows.start * B, rows.stop * B]}))

    def note(key: str, squares: Array, append: bool) -> None:
        for rows, columns, weight, found in chain.from_iterable(parts.values()):
            chosen = squares[rows, columns]
            mean = float((chosen @ weight).mean()) if len(chosen) else None
            if append:
                found.setdefault(key, []).append(mean)
            else:
                found[key] = mean

    note("signal", true**2, append=False)
    note("noise", followed.variance, append=False)
    for n in lengths:
        noisy, exact = averaged(followed.batch, n, B), averaged(true, n, B)
        note("drift", (true[n // B :] - true[: -(n // B)]) ** 2, append=True)
        note("error", (noisy - true) ** 2, append=True)
        note("lag", (exact - true) ** 2, append=True)
        note("scatter", (noisy - exact) ** 2, append=True)
    return {name: [found for *_, found in phases_of] for name, phases_of in parts.items()}


def averaged(values: Array, horizon: int, batch_size: int) -> Array:
    """The debiased running average (T, P) of the optimizer."""
    average = DebiasedEWMA(decay_of(horizon))
    found = np.empty_like(values)
    latest = values[0]
    for t, value in enumerate(values):
        w = average.weight(batch_size, (t + 1) * batch_size)
        latest = latest + w * (value - latest)
        found[t] = latest
    return found


def scatter_of(horizon: float, noise: float, batch_size: int) -> float:
    """Variance of the average of independent batches, in its limit: tr Sigma / B (1 - rho^B) / (1 + rho^B)."""
    rho = float(decay_of(horizon)) ** batch_size
    return noise / batch_size * (1 - rho) / (1 + rho)
