"""The largest batch whose training step fits into memory: measured on small ones, extrapolated, and measured there."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from experiments.benchmarks.meter import Cuda, Meter, Profiled
from experiments.data import Dataset
from experiments.errors import UserError
from experiments.models import build_model
from experiments.optimizers import attach_statistics, build_optimizer, stepper
from experiments.schemas.run import Config

GIGABYTE = 1e9
# torch's profiler would write two lines to stderr each time.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


@dataclass(frozen=True)
class Capacity:
    """The largest batch, and the peak of every batch size that a step was taken at, in bytes; inf where it failed.

    complete: the training set has no larger batch.
    """

    batch_size: int
    peaks: dict[int, float]
    budget: float
    complete: bool


def free_memory(device: torch.device) -> float:
    """In bytes: all of a GPU that nobody has, half of the machine."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2


def largest_batch(peak: Callable[[int], float], first: int, most: int, budget: float) -> Capacity:
    """Among first, 2 first, 4 first, ..., up to most: the largest whose measured peak is within the budget.

    The peak is taken for linear in the batch size, from two of those that were measured, to jump near the answer.
    Raises UserError if even the first is too large.
    """
    peaks = {first: peak(first)}
    if peaks[first] > budget:
        needed = f"takes {peaks[first] / GIGABYTE:.3g} GB" if math.isfinite(peaks[first]) else "does not fit"
        raise UserError(
            f"a step at batch size {first} {needed}, and {budget / GIGABYTE:.3g} GB may be used: raise tune.memory_gb, "
            "or lower tune.batch_size"
        )
    largest, candidate = first, 2 * first
    ceiling = math.inf
    while candidate <= most and candidate < ceiling:
        peaks[candidate] = peak(candidate)
        if peaks[candidate] > budget:
            ceiling = candidate
            candidate = max(2 * largest, candidate // 2)
            continue
        largest = candidate
        slope = (peaks[largest] - peaks[first]) / (largest - first)
        doublings = math.log2(most / largest)
        if slope > 0:
            reach = largest + (budget - peaks[largest]) / slope
            doublings = min(doublings, math.log2(reach / largest))
        candidate = largest * 2 ** max(1, math.floor(doublings))
    return Capacity(largest, peaks, budget, complete=2 * largest > most)


def step_memory(config: Config, data: Dataset, device: torch.device, batch_size: int) -> float:
    """Peak bytes of model, optimizer and a step, beside the data; inf if the GPU has not so much."""
    meter: Meter = Cuda() if device.type == "cuda" else Profiled()
    try:
        with meter.contestant():
            step = training_step(config, data, device, batch_size)
            step()  # allocates the optimizer's state, and what is made once
            with meter.steps():
                step()
    except torch.OutOfMemoryError:
        return math.inf
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return meter.peak


def training_step(config: Config, data: Dataset, device: torch.device, batch_size: int) -> Callable[[], None]:
    """That of experiments.train, on the first examples."""
    x, y = (t.to(device) for t in data.train.take(torch.arange(batch_size, device=data.train.x.device)))
    model = build_model(config.model, data.shape, data.classes, data.discrete).to(device)
    parameters = list(model.parameters())
    optimizer = build_optimizer(parameters, config.optimizer, batch_size, config.train.max_norm)
    statistics = attach_statistics(model, optimizer, config.optimizer, engine=config.engine)
    take = stepper(optimizer, batch_size if statistics is None else None)
    if config.hardware.compile and statistics is not None:
        statistics.probe(x)
    forward = torch.compile(model) if config.hardware.compile else model

    def step() -> None:
        for p in parameters:
            p.grad = None
        with torch.autocast(device.type, torch.bfloat16) if config.hardware.bf16 else nullcontext():
            loss = F.cross_entropy(forward(x).flatten(0, -2), y.flatten())
        loss.backward()
        take()

    return step
