"""Data and model as one coordinate of a measurement: the overrides that make them from the defaults of conf/."""

from __future__ import annotations

import functools
import json
import shlex

import torch
from torch import nn

from experiments.config import compose_config
from experiments.data import Dataset, load_data
from experiments.fingerprint import as_dict, flatten
from experiments.models import build_model
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
    """On the CPU, the model as a run of experiments.train with this seed has it at the start."""
    data = data_of(problem)
    torch.manual_seed(seed)
    return data, build_model(as_configured(problem).model, data.shape, data.classes, data.discrete)
