"""Data, model and loss of training loops that are not experiments.train's; on the CPU.

As one coordinate of a measurement a problem is the overrides that make data and model from the defaults of conf/.
"""

from __future__ import annotations

import functools
import json
import shlex

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.config import compose_config
from experiments.data import Dataset, Split, load_data
from experiments.fingerprint import as_dict, flatten
from experiments.models import build_model
from experiments.schemas.model import ModelConfig
from experiments.schemas.run import Config

GROUPS = ("data", "model")


@functools.cache
def composed(*overrides: str) -> Config:
    """Kept, since composing takes longer than a short measurement."""
    return compose_config(overrides)


def problem_of(config: Config) -> str:
    """As in "data=digits model=mlp model.dropout=0": what `as_configured` makes the same data and model of."""
    members = [f"data={config.data.name}", f"model={config.model.name}"]
    own, default = as_dict(config), as_dict(composed(*members))
    changed = [
        f"{group}.{key}={json.dumps(value)}"
        for group in GROUPS
        for key, value in flatten(own[group])
        if value != default[group][key]
    ]
    return shlex.join([*members, *changed])


def as_configured(problem: str) -> Config:
    return composed(*shlex.split(problem))


@functools.cache
def data_of(problem: str) -> Dataset:
    return load_data(as_configured(problem).data, torch.device("cpu"))


def build(problem: str, seed: int) -> tuple[Dataset, nn.Module]:
    """The data, and `initial` on it."""
    data = data_of(problem)
    return data, initial(as_configured(problem).model, data, seed)


def initial(config: ModelConfig, data: Dataset, seed: int) -> nn.Module:
    """The model as a run of experiments.train with this seed begins with it; dropout goes on with the seed."""
    torch.manual_seed(seed)
    return build_model(config, data.shape, data.classes, data.discrete)


def mean_loss(logits: Tensor, y: Tensor) -> Tensor:
    """Over the targets (nats), of which an example has one or, in a sequence, one a position."""
    return F.cross_entropy(logits.flatten(0, -2), y.flatten())


def backward(model: nn.Module, x: Tensor, y: Tensor, scale: float = 1.0) -> None:
    """Leaves in .grad the gradient of the mean loss of these examples, times the scale."""
    model.zero_grad()
    (scale * mean_loss(model(x), y)).backward()


@torch.no_grad()
def predictions(model: nn.Module, x: Tensor) -> Tensor:
    """Logits (N, classes) or (N, T, classes), in evaluation mode; the model is left in the mode it was in."""
    training = model.training
    found: Tensor = model.eval()(x)
    model.train(training)
    return found


def loss_of(model: nn.Module, split: Split) -> float:
    """Mean over the targets (nats), in evaluation mode."""
    return mean_loss(predictions(model, split.x), split.y).item()
