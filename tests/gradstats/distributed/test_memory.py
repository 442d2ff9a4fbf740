"""A sharded model's statistics: of one layer at a time in full, of all of them this rank's shards."""

import itertools
import weakref

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

import gradstats
from gradstats.distributed.local import local
from gradstats.distributed.sharded import Shards
from tests.gradstats.distributed.sharding import line, loss_of, mine

WIDTHS = [6, 32, 24, 40, 16, 3]
BYTES = 8


def bytes_held():
    """Of full-size sums, the most at any time; of one layer, the most; of what is kept; and of all in full."""
    layers = [nn.Sequential(nn.Linear(i, o), nn.Tanh()) for i, o in itertools.pairwise(WIDTHS)]
    model = nn.Sequential(*layers).double()
    for block in (model[1], model[2]):
        fully_shard(block, mesh=line())
    fully_shard(model, mesh=line())
    stats = gradstats.attach(model, "second_moment", "max_abs")
    stats.probe(torch.randn(4, 6).double())
    alive, most = [], 0
    scattered = Shards.scattered

    def watched(self, own, p, raw):
        nonlocal most
        alive.append(weakref.ref(own))
        in_full = [t for reference in alive if (t := reference()) is not None]
        waiting = [s.grad for a in stats.accounts.values() for s in a.shadows.values() if s.grad is not None]
        storages = {t.untyped_storage().data_ptr(): t.numel() for t in (*in_full, *waiting)}
        most = max(most, BYTES * sum(storages.values()))
        return scattered(self, own, p, raw)

    Shards.scattered = watched
    try:
        x, y = torch.randn(4, 6).double(), torch.randint(3, (4,))
        loss_of(model(mine(x)), mine(y)).backward()
    finally:
        Shards.scattered = scattered
    layer = max(i * o + o for i, o in itertools.pairwise(WIDTHS)) * BYTES
    kept = sum(BYTES * local(stats.read(name)[p]).numel() for name in stats.statistics for p in stats.parameters())
    assert all(s.grad is None for a in stats.accounts.values() for s in a.shadows.values())
    assert len(alive) == 2 * len(stats.parameters())
    return most, layer, kept, 2 * BYTES * sum(p.numel() for p in model.parameters())


def test_one_layer_at_a_time(two):
    found = two(bytes_held)
    for most, layer, _, in_full in found:
        assert layer <= most <= 2 * layer < in_full  # of two sums
    assert sum(kept for *_, kept, _ in found) == found[0][3]
