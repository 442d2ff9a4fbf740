"""The table of optimizers: every row runs through the contract (tests/gradstats/optim/test_contract.py, test_state.py),
and those with a counterpart in torch through test_torch.py."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

import gradstats
from gradstats import optim
from gradstats.handle import Handle
from gradstats.optim.base import ExampleOptimizer

TUNED = 16


@dataclass(frozen=True)
class Row:
    """An optimizer at one setting, tuned at batches of TUNED examples."""

    name: str
    kind: type[ExampleOptimizer]
    options: Mapping[str, Any] = field(default_factory=dict)
    statistics: tuple[str, ...] = ("second_moment",)  # that attach must gather; () needs no attached model
    theirs: tuple[type[torch.optim.Optimizer], Mapping[str, Any]] | None = None  # the same trajectory at B = TUNED
    whole: bool = False  # a step of one parameter depends on all others
    buffers: int = 2  # that it may keep, shaped like the parameter; Adam keeps two
    unit: int = 1  # how many examples are counted as one

    def __call__(self, parameters: Iterable[Any], **options: Any) -> ExampleOptimizer:
        return self.kind(parameters, **{"lr": 0.01, "batch_size": TUNED // self.unit} | dict(self.options) | options)

    def attach(self, model: nn.Module, **attachment: Any) -> Handle:
        if self.unit > 1:
            attachment |= {"granularity": "microbatch", "microbatch_size": self.unit}
        return gradstats.attach(model, *self.statistics, **attachment)

    def torchs(self, parameters: Iterable[Any], **options: Any) -> torch.optim.Optimizer:
        assert self.theirs is not None
        kind, theirs = self.theirs
        return kind(parameters, **{"lr": 0.01} | dict(theirs) | options)

    def count(self, sizes: Iterable[int]) -> int:
        """Of what is counted, in batches of these sizes."""
        return sum(sizes) // self.unit


BALL: dict[str, Any] = {"lr": 0.05, "momentum": 0.9}
MOVING: dict[str, Any] = {"lr": 0.005, "alpha": 0.95}
BETAS: dict[str, Any] = {"betas": (0.8, 0.95)}
DECAY: dict[str, Any] = {"weight_decay": 0.02}
COUPLED: dict[str, Any] = {"decoupled_weight_decay": False}


def sgd(name: str, theirs: Mapping[str, Any] | None, **options: Any) -> Row:
    """With torch's options, if there is a counterpart, and more."""
    counterpart = None if theirs is None else (torch.optim.SGD, theirs)
    return Row(name, optim.BatchInvariantSGD, dict(theirs or {}) | options, (), counterpart)


def rmsprop(name: str, theirs: Mapping[str, Any] | None, buffers: int = 2, **options: Any) -> Row:
    counterpart = None if theirs is None else (torch.optim.RMSprop, theirs)
    return Row(name, optim.BatchInvariantRMSprop, dict(theirs or {}) | options, theirs=counterpart, buffers=buffers)


def adam(name: str, theirs: Mapping[str, Any] | None, **options: Any) -> Row:
    counterpart = None if theirs is None else (torch.optim.Adam, theirs)
    return Row(name, optim.BatchInvariantAdam, dict(theirs or {}) | options, theirs=counterpart)


ROWS = [
    sgd("momentum", BALL),
    sgd("sgd", {"lr": 0.1}),
    sgd("sgd running average", None, **BALL, **DECAY, average="debiased_ewma", nesterov=True),
    rmsprop("rmsprop", MOVING),
    rmsprop("centered with momentum", MOVING | DECAY | {"momentum": 0.9, "centered": True}, 3, **COUPLED),
    Row("adamw", optim.BatchInvariantAdam, BETAS | DECAY, theirs=(torch.optim.AdamW, BETAS | DECAY)),
    replace(adam("amsgrad", BETAS | DECAY | {"amsgrad": True}, **COUPLED), buffers=3),
    replace(adam("adam of the batch mean", BETAS, source="squared_batch_mean"), statistics=()),
    adam("adam R=1", None, reference_batch_size=1),
    replace(adam("adam R=64", None, reference_batch_size=64, estimator="previous"), buffers=4),
    adam("adam of the variance", None, source="variance"),
    adam("adam of the slides", None, denominator="slides", eps=0.1, average="slides"),
    Row("sign of the running average", optim.BatchInvariantSignSGD, DECAY, ()),
    Row("sign of the example", optim.BatchInvariantSignSGD, {"placement": "example"}, ("sign_mean",)),
    Row("lion", optim.BatchInvariantLion, DECAY, ()),
    Row("variance-adapted sgd", optim.VarianceAdaptedSGD, BALL),
    Row("variance-adapted adam", optim.VarianceAdaptedAdam, DECAY, buffers=3),
    Row("saturating sgd", optim.SaturatingSGD, BALL, whole=True),
    Row("saturating sgd by coordinate", optim.SaturatingSGD, BALL | {"over": "coordinate"}, buffers=3),
    Row("saturating adam", optim.SaturatingAdam, DECAY, whole=True),
    Row("quenching sgd", optim.QuenchingSGD, {"lr": 0.1}, buffers=3),
    Row("microbatch adamw", optim.MicrobatchAdamW, unit=4),
    Row("adascale", optim.AdaScale, BALL, theirs=(torch.optim.SGD, BALL), whole=True),
]
# More settings in which torch has the same.
COUNTERPARTS = [
    *(row for row in ROWS if row.theirs is not None),
    sgd("dampening", BALL | {"dampening": 0.5}),
    sgd("nesterov", BALL | {"nesterov": True}),
    sgd("momentum and coupled decay", BALL | DECAY, **COUPLED),
    rmsprop("centered", MOVING | {"centered": True}),
    rmsprop("rmsprop with momentum", MOVING | {"momentum": 0.9}),
    adam("adam", BETAS),
    adam("adam with coupled decay", BETAS | DECAY, **COUPLED),
]
