"""The digits and their network, trained by a step of one's own: what is no optimizer of the configuration."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.data import Dataset, load_data
from experiments.errors import UserError
from experiments.models.mlp import mlp
from experiments.sampler import Sampler
from experiments.schedule import learning_rate_schedule
from experiments.schemas.data import ArraysConfig
from experiments.schemas.model import MLPConfig, Normalisation
from experiments.schemas.run import Config, Decay

# As in conf/data/digits.yaml and conf/model/mlp.yaml.
DATA = ArraysConfig("digits", path=None, test_fraction=0.2, split_seed=0)
MODEL = MLPConfig("mlp", widths=[64], normalisation=Normalisation.none, dropout=0.5)

CPU = torch.device("cpu")


def refuse_others(config: Config) -> None:
    """Raises UserError for data or a model that would not be used."""
    if config.data != DATA or config.model != MODEL:
        raise UserError(
            f"data={config.data.name} with model={config.model.name}: {config.name} trains on the digits, with the "
            "network of model=mlp as it is; leave both, and their keys, away"
        )


@cache
def digits() -> Dataset:
    return load_data(DATA, CPU)


def network(seed: int) -> nn.Sequential:
    """As experiments.train makes it of this seed, which is then that of dropout too."""
    torch.manual_seed(seed)
    data = digits()
    return mlp(MODEL, data.shape, data.classes)


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
    data = digits().train
    x = data.x.to(next(model.parameters()).dtype)
    sampler = Sampler(len(x), batch_size, seed, CPU)
    schedule = learning_rate_schedule(warmup, counts[-1], Decay.none)
    for count in counts:
        for indices in sampler.until(count):
            model.zero_grad()
            (loss_scale * F.cross_entropy(model(x[indices]), data.y[indices])).backward()
            step(schedule.mean(sampler.position - batch_size, sampler.position))
        yield


def losses(model: nn.Module, steps: Iterable[None], points: int) -> list[float]:
    """Loss over the training set (nats) at so many points of the training.

    No loss counts for more than the initial model's; once it stops being finite, it counts for that.
    """
    initial = training_loss(model)
    found: list[float] = []
    for _ in steps:
        latest = training_loss(model)
        if not math.isfinite(latest):
            break
        found.append(min(latest, initial))
    return found + [initial] * (points - len(found))


def training_loss(model: nn.Module) -> float:
    return F.cross_entropy(predictions(model), digits().train.y).item()


@torch.no_grad()
def predictions(model: nn.Module) -> Tensor:
    """Logits (N, classes) of the training set, in evaluation mode."""
    model.eval()
    found: Tensor = model(digits().train.x.to(next(model.parameters()).dtype))
    model.train()
    return found


def log_spaced(batch_size: int, epochs: float, points: int) -> list[int]:
    """So many counts of examples, or fewer, from about a twentieth of an epoch to all epochs, in whole batches."""
    examples = len(digits().train)
    ratio = 20 * epochs
    spaced = (examples / 20 * ratio ** (i / (points - 1)) for i in range(points))
    return sorted({max(1, math.floor(count / batch_size + 1e-9)) * batch_size for count in spaced})
