"""A run of one's own, to look at on the way: what a measurement sees of the model at some counts of examples."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

import gradstats
from experiments.data import Dataset
from experiments.laboratory.problem import backward, build
from experiments.optimizers import attach_statistics, build_optimizer, stepper
from experiments.sampler import Sampler
from experiments.schedule import learning_rate_schedule
from experiments.schemas.optimizer import OptimizerConfig
from experiments.schemas.run import Decay


class Look(NamedTuple):
    """After so many examples. The model is not to be changed, and what is attached to it is the run's; `looked_at` is
    a copy."""

    seen: int
    data: Dataset
    model: nn.Module
    optimizer: torch.optim.Optimizer


def along(
    problem: str,
    optimizer: OptimizerConfig,
    batch_size: int,
    warmup: int,
    seed: int,
    counts: Sequence[int],
    labels: Tensor | None = None,
    gathered: Sequence[str] = (),
    each: Callable[[gradstats.Handle], None] | None = None,
) -> Iterator[Look]:
    """Comes back after each count of examples, all multiples of the batch size, ascending.

    The run is that of experiments.train with these settings: same initial model, same examples, with these labels in
    place of the training set's if there are any. each(handle) is called with the statistics of every batch, of which
    these are gathered too, before its step.
    """
    data, model = build(problem, seed)
    if labels is not None:
        data = dataclasses.replace(data, train=dataclasses.replace(data.train, y=labels))
    built = build_optimizer(list(model.parameters()), optimizer, batch_size, max_norm=None)
    statistics = attach_statistics(model, built, optimizer, *gathered)
    step = stepper(built, batch_size if statistics is None else None)
    peak = built.param_groups[0]["lr"]
    schedule = learning_rate_schedule(warmup, counts[-1], Decay.none)
    sampler = Sampler(len(data.train), batch_size, seed, torch.device("cpu"))
    for count in counts:
        for indices in sampler.until(count):
            backward(model, *data.train.take(indices))
            if each is not None and statistics is not None:
                each(statistics)
            built.param_groups[0]["lr"] = peak * schedule.mean(sampler.position - batch_size, sampler.position)
            step()
        yield Look(count, data, model, built)


def looked_at(problem: str, seed: int, model: nn.Module) -> nn.Module:
    """A copy that nothing is attached to, in evaluation mode: gradients without the noise of dropout."""
    with torch.random.fork_rng(devices=[]):  # the run's dropout goes on where it was
        _, copy = build(problem, seed)
    copy.load_state_dict(model.state_dict())
    return copy.eval()
