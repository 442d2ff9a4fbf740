"""Probes of a sharded model: every forward gathers parameters from all ranks."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import gradstats
from gradstats.distributed.lockstep import FailedElsewhere
from gradstats.errors import CoverageError
from gradstats.forwards import Forwards
from tests.gradstats.distributed.sharding import (
    MODELS,
    apart,
    batches,
    line,
    loss_of,
    mine,
    pair,
    shard,
)


def cost(stats):
    return stats.coverage().splitlines()[-1]


def ahead():
    """It counts as the probe of the first call."""
    model, alone, stats, expected = pair("gpt")
    x, y = next(batches("gpt", 1))
    stats.probe(mine(x))
    before = cost(stats)
    loss_of(model(mine(x)), mine(y)).backward()
    loss_of(alone(x), y).backward()
    assert before.startswith("1 probes") and before == cost(stats)
    return apart(stats, expected, "second_moment")


def test_probed_ahead(two):
    assert max(two(ahead)) <= 1e-12


def unequal():
    """One rank has one example, whose probe runs fewer forwards; the others wait for each other, and it with them."""
    _, _, stats, _ = pair("gpt")
    x, _ = next(batches("gpt", 1))
    forwards = []
    run = Forwards._run

    def counted(self, rows, replaced):
        forwards.append(len(rows))
        return run(self, rows, replaced)

    Forwards._run = counted
    try:
        stats.probe(x[:1] if dist.get_rank() else x)
    finally:
        Forwards._run = run
    return len(forwards), stats.probe_cost[1]


def test_no_rank_runs_a_forward_more(two):
    (ours, own), (theirs, others) = two(unequal)
    assert ours == theirs == max(own, others)


class Mixing(nn.Module):
    """Mixes examples, on the last rank only."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(5, 3)

    def forward(self, x):
        y = self.inner(x)
        return y + y.mean(0) if dist.get_rank() == dist.get_world_size() - 1 else y


def refused_on_one():
    model = nn.Sequential(Mixing(), nn.Linear(3, 3)).double()
    fully_shard(model[0], mesh=line())
    fully_shard(model, mesh=line())
    gradstats.attach(model)
    last = dist.get_rank() == dist.get_world_size() - 1
    with pytest.raises(CoverageError, match="depends on the other examples" if last else "on another rank") as caught:
        model(mine(next(batches("mlp", 1))[0]))
    assert isinstance(caught.value, FailedElsewhere) is not last


def test_all_ranks_stop_where_one_is_refused(two):
    two(refused_on_one)


class Odd(nn.Module):
    """Uses a weight outside of its layer, on the last rank only."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(5, 5)

    def forward(self, x):
        y = self.inner(x)
        return y @ self.inner.weight if dist.get_rank() == dist.get_world_size() - 1 else y


def found_different():
    model = nn.Sequential(Odd(), nn.Linear(5, 3)).double()
    fully_shard(model[0], mesh=line())
    fully_shard(model, mesh=line())
    gradstats.attach(model)
    with pytest.raises(CoverageError, match="different layers on different ranks"):
        model(mine(next(batches("mlp", 1))[0]))


def test_ranks_agree_on_layers(two):
    two(found_different)


def of_zeros(gathered):
    """Layers that begin at zero are noisy while they are probed, also where their parameters stay gathered, or were."""
    torch.manual_seed(1)
    alone = MODELS["gpt"][0]().double()
    with torch.no_grad():
        for block in alone.blocks:
            block.projection.weight.zero_()
            block.mlp[2].weight.zero_()
    model = shard(copy.deepcopy(alone), reshard_after_forward=gathered != "after")
    stats, expected = gradstats.attach(model), gradstats.attach(alone)
    x, y = next(batches("gpt", 1))
    if gathered == "before":
        for block in model.blocks:
            block.unshard()
    loss_of(model(mine(x)), mine(y)).backward()
    loss_of(alone(x), y).backward()
    return apart(stats, expected, "second_moment")


@pytest.mark.parametrize("gathered", ["before", "after", "never"])
def test_a_probe_leaves_no_noise(two, gathered):
    assert max(two(of_zeros, gathered)) <= 1e-12


class Centered(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


def hidden_by_zeros():
    """What mixes examples behind a layer that begins at zero is seen, since that is noisy."""
    model = nn.Sequential(nn.Linear(5, 6), Centered(), nn.Linear(6, 3)).double()
    with torch.no_grad():
        for p in model[0].parameters():
            p.zero_()
    fully_shard(model[0], mesh=line())
    fully_shard(model, mesh=line())
    gradstats.attach(model)
    with pytest.raises(CoverageError, match="depends on the other examples"):
        model(mine(next(batches("mlp", 1))[0]))


def test_zeros_hide_nothing(two):
    two(hidden_by_zeros)
