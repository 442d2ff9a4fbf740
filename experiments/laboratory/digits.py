"""The digits and their network, trained by a step of one's own: what is no optimizer of the configuration."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import nn

from experiments.data import Split
from experiments.errors import UserError
from experiments.laboratory.problem import backward, build, data_of, loss_of, problem_of
from experiments.sampler import Sampler
from experiments.schedule import learning_rate_schedule
from experiments.schemas.run import Config, Decay

PROBLEM = "data=digits model=mlp"


def refuse_others(config: Config) -> None:
    """Raises UserError for data or a model that would not be used."""
    if problem_of(config) != PROBLEM:
        raise UserError(
            f"data={config.data.name} with model={config.model.name}: {config.name} trains on the digits, with the "
            "network of model=mlp as it is; leave both, and their keys, away"
        )


def network(seed: int) -> nn.Sequential:
    _, model = build(PROBLEM, seed)
    assert isinstance(model, nn.Sequential)
    return model


def examples(dtype: torch.dtype = torch.float32) -> Split:
    """The training set."""
    train = data_of(PROBLEM).train
    return Split(train.x.to(dtype), train.y)


def training(
    model: nn.Module,
    step: Callable[[float], None],
    *,
    batch_size: int,
    seed: int,
    warmup: int,
    counts: Sequence[int],
    loss_scale: float = 1.0,
) -> Iterator[None]:
    """Comes back after each count of examples, all multiples of the batch size, ascending.

    step(multiplier) changes the parameters by their gradients, those of loss_scale times the mean loss of a batch; the
    multiplier is that of the learning rate, which warms up over so many examples.
    """
    data = examples(next(model.parameters()).dtype)
    sampler = Sampler(len(data), batch_size, seed, data.x.device)
    schedule = learning_rate_schedule(warmup, counts[-1], Decay.none)
    for count in counts:
        for indices in sampler.until(count):
            backward(model, data.x[indices], data.y[indices], loss_scale)
            step(schedule.mean(sampler.position - batch_size, sampler.position))
        yield


def losses(model: nn.Module, steps: Iterable[None], points: int) -> list[float]:
    """Loss over the training set (nats) at so many points of the training.

    No loss counts for more than the initial model's; once it stops being finite, it counts for that.
    """
    initial = loss_of(model, examples())
    found: list[float] = []
    for _ in steps:
        latest = loss_of(model, examples())
        if not math.isfinite(latest):
            break
        found.append(min(latest, initial))
    return found + [initial] * (points - len(found))


def log_spaced(batch_size: int, epochs: float, points: int) -> list[int]:
    """So many counts of examples, or fewer, from about a twentieth of an epoch to all epochs, in whole batches."""
    first, ratio = len(examples()) / 20, 20 * epochs
    spaced = (first * ratio ** (i / (points - 1)) for i in range(points))
    return sorted({max(1, math.floor(count / batch_size + 1e-9)) * batch_size for count in spaced})
