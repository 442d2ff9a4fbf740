"""Under DistributedDataParallel every statistic is that of one process with the examples of all ranks."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.profiler import ProfilerActivity, profile

import gradstats
from gradstats.optim import BatchInvariantAdam
from tests.gradstats.distributed.replicas import (
    MODELS,
    STATISTICS,
    check_equal,
    ddp_of,
    loss_of,
    of_one_process,
    problem,
    rank_of,
    read,
    share,
    vector,
)

OPTIONS = {
    "plain": {},
    "views": {"gradient_as_bucket_view": True},
    "unused": {"find_unused_parameters": True},
    "static": {"static_graph": True},
    "static views": {"static_graph": True, "gradient_as_bucket_view": True},
}


def every_statistic(name, options=None, hook=False, before=False):
    model, x, y = problem(name)
    stats = gradstats.attach(model, *STATISTICS) if before else None
    ddp = ddp_of(model, **(options or {}))
    if hook:
        ddp.register_comm_hook(None, allreduce_hook)
    stats = stats or gradstats.attach(ddp, *STATISTICS)
    expected = of_one_process(name)
    for _ in range(3):  # DDP makes its buckets anew after the first step, and runs a static graph otherwise
        ddp.zero_grad()
        loss_of(ddp(share(x[:8])), share(y[:8])).backward()
        check_equal(read(stats), expected)


@pytest.mark.parametrize("name", MODELS)
def test_every_statistic(two, name):
    two(every_statistic, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_statistic_of_four(four, name):
    four(every_statistic, name)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("hook", [False, True], ids=["ours", "theirs"])
def test_every_way_of_ddp(two, options, hook):
    """`theirs`: the user has registered a communication hook, and sums follow the gradients."""
    two(every_statistic, "mlp", OPTIONS[options], hook)


def test_attached_before_it_is_wrapped(two):
    two(every_statistic, "mlp", None, False, True)
