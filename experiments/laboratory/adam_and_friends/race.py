"""A bare training loop for torch's optimizers and ours, at one setting, and the time of every step."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer, RMSprop

import gradstats
from experiments.data import Split, load_data
from experiments.laboratory.problem import initial, loss_of
from experiments.optimizers import read_statistics, stepper
from experiments.sampler import Sampler
from experiments.schemas.data import ArraysConfig
from experiments.schemas.model import MLPConfig, Normalisation
from gradstats.optim import BatchInvariantAdam, BatchInvariantRMSprop, BatchInvariantSGD

CPU = torch.device("cpu")
MOMENTUM = 0.9
BETAS = (0.9, 0.999)
ALPHA = 0.99


@dataclass(frozen=True)
class Method:
    """torch's optimizer, in one of its forms, and ours with torch's values; lr: a first guess on the digits."""

    label: str
    lr: float
    torch: Callable[..., Optimizer]
    ours: Callable[..., Optimizer]
    fused: bool = True
    full_batch: bool = False


def torch_sgd(ps: list[Tensor], lr: float, **form: bool) -> Optimizer:
    return SGD(ps, lr, **form)


METHODS = {
    "full_batch": Method("full-batch descent", 0.5, torch_sgd, BatchInvariantSGD, full_batch=True),
    "sgd": Method("SGD", 0.5, torch_sgd, BatchInvariantSGD),
    "momentum": Method(
        "SGD with momentum",
        0.1,
        lambda ps, lr, **form: SGD(ps, lr, MOMENTUM, **form),
        lambda ps, lr, batch_size: BatchInvariantSGD(ps, lr, MOMENTUM, batch_size=batch_size),
    ),
    "rmsprop": Method(
        "RMSProp",
        2e-3,
        lambda ps, lr, **form: RMSprop(ps, lr, ALPHA, **form),
        lambda ps, lr, batch_size: BatchInvariantRMSprop(ps, lr, ALPHA, batch_size=batch_size),
        fused=False,
    ),
    "adam": Method(
        "Adam",
        4e-3,
        lambda ps, lr, **form: Adam(ps, lr, BETAS, **form),
        lambda ps, lr, batch_size: BatchInvariantAdam(ps, lr, BETAS, batch_size=batch_size),
    ),
}
# torch_loop is torch's other form, one parameter after another: the same algorithm, rounded differently.
SIDES = ("torch", "torch_loop", "ours")
# Of the best learning rate, for the comparison in float64: at the best, near the edge of stability, training makes
# hundredths of a nat of the rounding of float64.
CALM = 0.125


def build(method: str, side: str, parameters: list[Tensor], lr: float, batch_size: int) -> Optimizer:
    """Torch's fastest form where it is not the loop; ours tuned at the batch size of the run."""
    chosen = METHODS[method]
    if side == "ours":
        return chosen.ours(parameters, lr, batch_size=batch_size)
    if side == "torch_loop":
        return chosen.torch(parameters, lr, foreach=False)
    return chosen.torch(parameters, lr, fused=True) if chosen.fused else chosen.torch(parameters, lr)


def race(
    method: str,
    side: str,
    lr: float,
    batch_size: int,
    steps: int,
    every: int,
    seed: int,
    data: str,
    path: str | None,
    test_fraction: float,
    split_seed: int,
    widths: str,
    normalisation: str,
    dropout: float,
    double: bool,
) -> dict[str, Any]:
    """The loss over the training set in evaluation mode, None where it is not finite, and the seconds spent in steps,
    after so many `steps`; step: the median seconds of one. widths: of the hidden layers, joined by x; double:
    float64.

    A step is: gather the batch, forward, backward, optimizer; evaluation is not on the clock. Seconds are of processor
    time: what else runs on the machine hardly shows in them.
    """
    loaded = load_data(ArraysConfig(data, path, test_fraction, split_seed), CPU)
    dtype = torch.float64 if double else torch.float32
    train = Split(loaded.train.x.to(dtype), loaded.train.y)
    b = len(train) if METHODS[method].full_batch else batch_size
    hidden = MLPConfig("mlp", [int(width) for width in widths.split("x")], Normalisation(normalisation), dropout)
    model = initial(hidden, loaded, seed).to(dtype)
    parameters: list[Tensor] = list(model.parameters())
    optimizer = build(method, side, parameters, lr, b)
    names = read_statistics(optimizer)
    if names:
        gradstats.attach(model, *names)
    step = stepper(optimizer, None if names else b)

    sampler = Sampler(len(train), b, seed, CPU)
    clock: list[float] = []
    found: dict[str, list[Any]] = {"steps": [0], "loss": [loss_of(model, train)], "seconds": [0.0]}
    for stop in range(every, steps + 1, every):
        for indices in sampler.until(stop * b):
            started = time.process_time()
            x, y = train.x.index_select(0, indices), train.y.index_select(0, indices)
            for p in parameters:
                p.grad = None
            F.cross_entropy(model(x), y).backward()
            step()
            clock.append(time.process_time() - started)
        loss = loss_of(model, train)
        found["steps"].append(stop)
        found["loss"].append(loss if math.isfinite(loss) else None)
        found["seconds"].append(sum(clock))
    return found | {"step": statistics.median(clock)}
