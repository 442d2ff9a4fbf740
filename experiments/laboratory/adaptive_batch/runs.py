"""Runs whose batch may grow, alone or in turns with others, so that their seconds can be compared."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F

import gradstats
from experiments.data import Split
from experiments.laboratory.adaptive_batch.contenders import Contender
from experiments.laboratory.problem import backward, build, loss_of
from experiments.optimizers import attach_statistics, build_optimizer
from experiments.sampler import Sampler
from experiments.schedule import learning_rate_schedule, log_spaced
from experiments.schemas.run import Decay
from experiments.study import default_optimizer
from gradstats.optim import AdaptiveBatchSize

SIZES = "noise_scale"  # the statistic that batch sizes follow


@dataclasses.dataclass
class Progress:
    """Of a run so far: seconds of training, without what is looked at; the batch size from here on.

    Seconds are of processor time, which on one thread are those of a machine that does nothing else: what else runs
    hardly shows in them.
    """

    model: torch.nn.Module
    train: Split
    test: Split
    steps: int = 0
    seconds: float = 0.0
    size: int = 0


def stepping(
    problem: str,
    method: str,
    contender: Contender,
    lr: float,
    horizon: int,
    warmup: int,
    seed: int,
    counts: Sequence[int],
) -> Iterator[Progress]:
    """Comes back after each count of examples, all multiples of the largest batch size, ascending; the same examples
    as any other run of this seed. Each batch has the contender's size, a power of two, once the examples before it are
    a multiple of that, and as many as divide them until then."""
    data, model = build(problem, seed)
    config = dataclasses.replace(default_optimizer(method), lr=lr)
    optimizer = build_optimizer(list(model.parameters()), config, contender.smallest, max_norm=None)
    statistics = attach_statistics(model, optimizer, config, *((SIZES,) if contender.grows else ()))
    adaptive = AdaptiveBatchSize(contender.smallest, contender.largest, horizon) if contender.grows else None
    schedule = learning_rate_schedule(warmup, counts[-1], contender.decay)
    order = Sampler(len(data.train), contender.smallest, seed, torch.device("cpu"))
    now = Progress(model, data.train, data.test, size=contender.smallest)
    position = 0
    for count in counts:
        started = time.process_time()
        while position < count:
            B = next_size(now.size, position)
            indices = torch.from_numpy(order.stream(position, position + B))
            backward(model, data.train.x[indices], data.train.y[indices])
            multiplier = schedule.mean(position, position + B)
            if contender.constant_step:
                multiplier *= contender.smallest / B
            optimizer.param_groups[0]["lr"] = lr * multiplier
            optimizer.step()
            if adaptive is not None:
                assert statistics is not None
                adaptive.update(statistics)
                now.size = adaptive.size
            position += B
            now.steps += 1
        now.seconds += time.process_time() - started
        yield now
    if statistics is not None:
        statistics.detach()


def next_size(size: int, position: int) -> int:
    """A power of two: the size, or what divides the position. Both being so, every multiple of the size is met."""
    return size if position % size == 0 else position & -position


def trained(
    problem: str,
    method: str,
    smallest: int,
    largest: int,
    decay: str,
    constant_step: bool,
    lr: float,
    horizon: int,
    warmup: int,
    examples: int,
    seed: int,
) -> dict[str, Any]:
    """Final losses (nats), none above the initial model's, and the steps it took."""
    contender = Contender(smallest, largest, Decay(decay), constant_step)
    (now,) = stepping(problem, method, contender, lr, horizon, warmup, seed, [examples])
    return {**losses(now, initial_losses(problem, seed)), "steps": now.steps}


def take_turns(
    problem: str,
    method: str,
    contenders: str,
    horizon: int,
    warmup: int,
    examples: int,
    multiple: int,
    points: int,
    seed: int,
) -> dict[str, Any]:
    """contenders: JSON of a row of fields of Contender and a learning rate, by label. All run in one process, in turns
    between counts of examples, which go around, so that a change of the machine's speed meets all of them alike.

    examples, log-spaced; and by label: train, test, steps, seconds, size, and noise, the noise scale over the training
    set (None of fixed sizes), at each of them.
    """
    counts = log_spaced(examples, multiple, points)
    first = initial_losses(problem, seed)
    rows = {
        label: (Contender(**{**row["contender"], "decay": Decay(row["contender"]["decay"])}), row["lr"])
        for label, row in json.loads(contenders).items()
    }
    for contender, lr in rows.values():  # nobody pays for what is done once a process
        next(stepping(problem, method, contender, lr, horizon, 0, seed, [multiple]))
    running = {
        label: Alone(stepping(problem, method, contender, lr, horizon, warmup, seed, counts))
        for label, (contender, lr) in rows.items()
    }
    _, copy = build(problem, seed)
    found: dict[str, Any] = {label: {} for label in rows}
    labels = list(rows)
    for turn in range(len(counts)):
        shift = turn % len(labels)
        for label in labels[shift:] + labels[:shift]:
            now = next(running[label])
            noise = noise_scale(now, copy, seed) if rows[label][0].grows else None
            at = {**losses(now, first), "steps": now.steps, "seconds": now.seconds, "size": now.size, "noise": noise}
            for key, value in at.items():
                found[label].setdefault(key, []).append(value)
    return {"examples": counts, "contenders": found}


class Alone:
    """A run whose random numbers, the masks of dropout, go on where they were, whatever others drew in between."""

    def __init__(self, run: Iterator[Progress]) -> None:
        self.run = run
        self.state = torch.get_rng_state()

    def __next__(self) -> Progress:
        torch.set_rng_state(self.state)
        now = next(self.run)
        self.state = torch.get_rng_state()
        return now


def initial_losses(problem: str, seed: int) -> tuple[float, float]:
    data, model = build(problem, seed)
    return loss_of(model, data.train), loss_of(model, data.test)


def losses(now: Progress, first: tuple[float, float]) -> dict[str, float]:
    """None counts for more than the initial model's, as one that is not finite does."""
    found = {}
    for name, split, initial in (("train", now.train, first[0]), ("test", now.test, first[1])):
        loss = loss_of(now.model, split)
        found[name] = min(loss, initial) if math.isfinite(loss) else initial
    return found


def noise_scale(now: Progress, copy: torch.nn.Module, seed: int) -> float | None:
    """Over the training set, with one draw of dropout's masks as training has them; none where |G|^2 is not above 0."""
    copy.load_state_dict(now.model.state_dict())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        found = gradstats.compute(copy, F.cross_entropy, now.train.x, now.train.y, statistics=[SIZES]).totals[SIZES]
    scale = float(found.simple)
    return scale if found.gradient_squared > 0 and math.isfinite(scale) else None
