"""Under DistributedDataParallel statistics and steps are those of one process with the examples of all ranks."""

import itertools

import pytest
import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import gradstats
from gradstats.optim import BatchInvariantAdam
from tests.gradstats.distributed.replicas import (
    FEW,
    MODELS,
    STATISTICS,
    check_equal,
    ddp_of,
    loss_of,
    of_one_process,
    ours,
    problem,
    read,
    share,
    train,
    vector,
)

OPTIONS = {
    "plain": {},
    "views": {"gradient_as_bucket_view": True},
    "unused": {"find_unused_parameters": True},
    "static": {"static_graph": True},
    "static views": {"static_graph": True, "gradient_as_bucket_view": True},
}


def without_noise(found):
    """The gradient of a key's bias is zero but for rounding, of which its sign, exponent and ratio to itself are."""
    noisy = [name for _, name in found if name.endswith("query_key_value.bias")]
    noisy += ["total"] if noisy else []
    return {
        key: t for key, t in found.items() if key[0] not in ("sign_mean", "snr", "histogram") or key[1] not in noisy
    }


def every_statistic(name, options=None, hook=False, before=False):
    model, x, y = problem(name)
    stats = gradstats.attach(model, *STATISTICS) if before else None
    ddp = ddp_of(model, **(options or {}))
    if hook:
        ddp.register_comm_hook(None, allreduce_hook)
    stats = stats or gradstats.attach(ddp, *STATISTICS)
    expected = without_noise(of_one_process(name))
    for _ in range(3):  # DDP makes its buckets anew after the first step, and runs a static graph otherwise
        ddp.zero_grad()
        loss_of(ddp(share(x[:8])), share(y[:8])).backward()
        check_equal(without_noise(read(stats)), expected)


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


def fifty_steps(name):
    model, x, y = problem(name)
    ddp = ddp_of(model)
    stats = gradstats.attach(ddp, *FEW)
    found = train(model, ddp, ours(model), x, y, part=share)
    alone, x, y = problem(name)
    start = vector(alone)
    stats_alone = gradstats.attach(alone, *FEW)
    expected = train(alone, alone, ours(alone), x, y)
    assert (expected - start).norm() > 0.1 * start.norm()
    assert (found - expected).norm() <= 1e-9 * expected.norm()
    check_equal(read(stats, FEW), read(stats_alone, FEW))


@pytest.mark.parametrize("name", MODELS)
def test_fifty_steps(two, name):
    two(fifty_steps, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_fifty_steps_of_four(four, name):
    four(fifty_steps, name)


def fifty_steps_in_float32(name):
    """Torch's runs, in one process, have the examples of every batch in other orders; ours under DDP is among them."""
    model, x, y = problem(name, torch.float32)
    ddp = ddp_of(model)
    gradstats.attach(ddp)
    found = train(model, ddp, BatchInvariantAdam(model.parameters(), lr=1e-2, batch_size=8), x, y, part=share)
    runs = []
    for seed in range(7):
        model, *_ = problem(name, torch.float32)
        order = torch.randperm(8, generator=torch.Generator().manual_seed(seed))
        runs.append(train(model, model, torch.optim.Adam(model.parameters(), lr=1e-2), x, y, order=order))
    own = max((a - b).norm() for a, b in itertools.combinations(runs, 2))
    found = torch.stack([(found - run).norm() for run in runs]).median()
    assert found <= own, (float(found), float(own))


@pytest.mark.parametrize("name", MODELS)
def test_fifty_steps_in_float32(two, name):
    two(fifty_steps_in_float32, name)
