"""Training with schedules in examples: annealing by learning rate or batch size, and snapshots along cycles."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.data import Dataset, Split
from experiments.laboratory.problem import backward, build, predictions
from experiments.optimizers import attach_statistics, build_optimizer
from experiments.sampler import Sampler
from experiments.study import default_optimizer
from gradstats.optim import Constant, Cosine, ExampleLR, Linear, Schedule, ScheduledBatchSampler, Warmup
from gradstats.optim.base import ExampleOptimizer
from gradstats.optim.batch_size import BatchSizeSchedule


def training(
    data: Dataset,
    model: nn.Module,
    method: str,
    lr: float,
    schedule: Schedule,
    size: int | BatchSizeSchedule,
    stops: Sequence[int],
    seed: int,
) -> Iterator[int]:
    """Trains up to the last of the stops, in ascending order, and yields at each the steps so far.

    lr is that of the method's own batch size. The batch sizes divide what lies between two stops.
    """
    tuned = default_optimizer(method)
    optimizer = build_optimizer(model.parameters(), tuned, tuned.batch_size, max_norm=None)
    assert isinstance(optimizer, ExampleOptimizer)
    optimizer.param_groups[0]["lr"] = lr
    ExampleLR(optimizer, schedule)
    attached = attach_statistics(model, optimizer, tuned)
    order = Sampler(len(data.train), 1, seed, data.train.x.device).stream(0, stops[-1]).tolist()
    examples, steps = 0, 0
    for indices in ScheduledBatchSampler(order, size):
        backward(model, data.train.x[indices], data.train.y[indices])
        optimizer.step(batch_size=len(indices) if attached is None else None)
        examples, steps = examples + len(indices), steps + 1
        if examples in stops:
            yield steps
    if attached is not None:
        attached.detach()


def log_probabilities(model: nn.Module, split: Split) -> Tensor:
    """(N, classes)"""
    return F.log_softmax(predictions(model, split.x).double(), dim=1)


def anneal(
    problem: str,
    method: str,
    lr: float,
    decays: bool,
    grows: bool,
    factor: int,
    stages: int,
    stage: int,
    warmup: int,
    batch_size: int,
    points: int,
    seed: int,
) -> dict[str, Any]:
    """Training loss at evenly spaced counts of examples, `points` a stage, and the number of steps.

    From stage to stage lr, in units of examples, falls by the factor if it decays; the batch size grows by it if it
    grows. Both together: in torch's units the learning rate stays, as in Smith et al. 2018.
    """
    data, model = build(problem, seed)
    levels = [factor ** (-i if decays else 0) for i in range(stages)]
    parts = [Warmup(warmup), Constant(stage - warmup), *(Linear(stage, level, level) for level in levels[1:])]
    schedule = reduce(Schedule.then, parts)

    def size(examples: int) -> int:
        return batch_size * factor ** min(examples // stage, stages - 1) if grows else batch_size

    stops = [stage // points * i for i in range(1, points * stages + 1)]
    loss = []
    for steps in training(data, model, method, lr, schedule, size, stops, seed):  # noqa: B007
        loss.append(F.nll_loss(log_probabilities(model, data.train), data.train.y).item())
    return {"examples": stops, "loss": loss, "steps": steps}


def distance(a: Tensor, b: Tensor) -> float:
    """Total variation between distributions given by log-probabilities (N, classes), mean over examples."""
    return float((a.exp() - b.exp()).abs().sum(dim=1).mean() / 2)


def mixture(members: Sequence[Tensor]) -> Tensor:
    """Log-probabilities of the mean of the members' probabilities."""
    stacked: Tensor = torch.stack(list(members)).exp().mean(dim=0).log()
    return stacked


def judged(predicted: Tensor, split: Split) -> dict[str, float]:
    """Of log-probabilities (N, classes): loss on every other example, to choose by; loss and accuracy on the rest, to
    report."""
    chosen = torch.arange(len(split)) % 2 == 0
    reported, y = predicted[~chosen], split.y[~chosen]
    return {
        "validation": F.nll_loss(predicted[chosen], split.y[chosen]).item(),
        "loss": F.nll_loss(reported, y).item(),
        "accuracy": float((reported.argmax(dim=1) == y).double().mean()),
    }


def snapshots(
    problem: str,
    method: str,
    lr: float,
    cycles: int,
    members: int,
    cycle: int,
    warmup: int,
    batch_size: int,
    seed: int,
) -> dict[str, dict[str, float]]:
    """Runs of as many examples: cycles of a cosine to zero, one cosine to zero, and that with another seed.

    Snapshots are the models at the ends of the last `members` cycles, and of a run without cycles those at the same
    counts. What is tested of the first two runs: the ensemble of their snapshots, and the last. Distances: between the
    snapshots of a run, all pairs; and between the last models of the second and the third run.
    """
    ends = [cycle * i for i in range(1, cycles + 1)]
    parts: list[Schedule] = [Warmup(warmup), Cosine(cycle - warmup), *[Cosine(cycle)] * (cycles - 1)]
    cyclic = reduce(Schedule.then, parts)
    single = Warmup(warmup).then(Cosine(cycle * cycles - warmup))
    runs = []
    for schedule, of in ((cyclic, seed), (single, seed), (single, seed + 1_000_000)):
        data, model = build(problem, of)
        runs.append(
            [
                log_probabilities(model, data.test)
                for _ in training(data, model, method, lr, schedule, batch_size, ends, of)
            ]
        )
    along, along_one, other = (run[-members:] for run in runs)
    return {
        "cycles, ensemble": judged(mixture(along), data.test),
        "cycles, last": judged(along[-1], data.test),
        "one run, ensemble": judged(mixture(along_one), data.test),
        "one run, last": judged(along_one[-1], data.test),
        "distance": {
            "cycles": _mean_distance(along),
            "one run": _mean_distance(along_one),
            "independent": distance(along_one[-1], other[-1]),
        },
    }


def _mean_distance(members: Sequence[Tensor]) -> float:
    pairs = list(combinations(members, 2))
    return sum(distance(a, b) for a, b in pairs) / len(pairs)
