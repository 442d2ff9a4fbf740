"""FSDP2: a sharded model has the statistics of one process that sees the examples of all ranks."""

import copy
import itertools
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._composable import checkpoint as composable_checkpoint
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

import gradstats
from experiments.gpt import GPT
from gradstats.distributed.local import whole
from gradstats.optim import BatchInvariantAdam
from tests.gradstats.distributed.sharding import (
    MODELS,
    B,
    apart,
    batches,
    distance,
    gpt,
    line,
    loss_of,
    made,
    mine,
    mlp,
    parameters_apart,
    shard,
)

STATISTICS = (
    *("second_moment", "variance", "norms", "sign_mean", "abs_mean", "max_abs", "snr", "noise_scale"),
    *("projection", "histogram"),
)
models = pytest.mark.parametrize("name", MODELS)


def numbers_of(name, value):
    """Tensors to compare: a ratio where it is not one of rounding errors, counts as they would be in the same bins."""
    if name == "histogram":
        return [value.counts.sum(), value.zeros, (value.counts * value.edges[1:]).nan_to_num(0, 0).sum()]
    if name == "noise_scale":
        return [value.gradient_squared, value.trace]
    return [value]


def compared(stats, expected, names):
    """The largest distance by statistic, over parameters and in total."""
    found = {}
    for name in names:
        ours, theirs = stats.read(name), expected.read(name)
        pairs = [(ours[p], theirs[p]) for p in theirs]
        if theirs.has_total:
            pairs.append((ours.total, theirs.total))
        found[name] = max(
            distance(a, b)
            for one, other in pairs
            for a, b in zip(numbers_of(name, one), numbers_of(name, other), strict=True)
        )
    return found


def trained(name, steps, dtype=torch.float64, **options):
    """The largest distances of parameters after so many steps, and of all statistics in the last of them."""
    model, alone = made(name, dtype, **options)
    ours, theirs = (BatchInvariantAdam(m.parameters(), lr=0.01, batch_size=16) for m in (model, alone))
    handles = gradstats.attach(model), gradstats.attach(alone)
    # Signs and ratios of gradients that are zero but for rounding, of the bias of keys, say nothing.
    last = [one for one in STATISTICS if name != "gpt" or one not in ("sign_mean", "snr", "histogram")]
    found = {}
    for step, (x, y) in enumerate(batches(name, steps, dtype), 1):
        if step == steps:
            for handle in handles:
                handle.detach()
            handles = gradstats.attach(model, *last), gradstats.attach(alone, *last)
        loss_of(model(mine(x)), mine(y)).backward()
        loss_of(alone(x), y).backward()
        assert handles[0].batch_size == handles[1].batch_size == len(x)
        if step == steps:
            found = compared(*handles, last)
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
    for p in model.parameters():
        state = ours.state[p]["exp_avg_sq"]
        assert isinstance(p, DTensor) and isinstance(state, DTensor) and state.placements == p.placements
    return found | {"parameters": parameters_apart(model, alone)}


@models
def test_equals_one_process(two, name):
    for found in two(trained, name, 50):
        assert max(found.values()) <= 1e-9, found


@pytest.mark.slow
@models
def test_equals_one_process_on_four(four, name):
    for found in four(trained, name, 50):
        assert max(found.values()) <= 1e-9, found


def followed(build, steps=2, dtype=torch.float64):
    """A model that `build` makes of one of one process: how far its statistics are, over steps, and its parameters."""
    torch.manual_seed(1)
    model, alone = build()
    stats, expected = (gradstats.attach(m, "second_moment", "variance", "norms", "max_abs") for m in (model, alone))
    ours, theirs = (BatchInvariantAdam(m.parameters(), lr=0.01, batch_size=16) for m in (model, alone))
    largest = 0.0
    for x, y in batches("gpt" if isinstance(alone, GPT) else "mlp", steps, dtype):
        loss_of(model(mine(x)), mine(y)).backward()
        loss_of(alone(x), y).backward()
        largest = max(largest, apart(stats, expected, *stats.statistics))
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
    return largest, parameters_apart(model, alone)


def copied(make, change=lambda model: None, before=lambda model: None, **options):
    """A sharded copy, `change`d before it is sharded, and the original, `before` the copy."""

    def build():
        alone = make().double()
        before(alone)
        model = copy.deepcopy(alone)
        change(model)
        return shard(model, **options), alone

    return build


def freeze(model):
    model.blocks[0].requires_grad_(False)
    model.tokens.weight.requires_grad_(False)
    model.blocks[1].mlp[0].bias.requires_grad_(False)


def recompute(model):
    model.checkpointed = True


def recompute_composably(model):
    for block in model.blocks:
        composable_checkpoint(block)


class Scaled(nn.Module):
    """No rule: it runs under vmap."""

    def __init__(self):
        super().__init__()
        self.scale, self.inner = nn.Parameter(torch.randn(7)), nn.Linear(7, 7)

    def forward(self, x):
        return self.inner(x) * self.scale


def with_a_vmap_leaf():
    return nn.Sequential(nn.Linear(5, 7), nn.Sequential(Scaled(), nn.Linear(7, 6)), nn.Linear(6, 3))


def functional():
    """A weight that is only used outside of its layer, in the same sharded block."""

    class Only(nn.Sequential):
        def forward(self, x):
            return torch.nn.functional.linear(x, self[0].weight).tanh()

    return nn.Sequential(Only(nn.Linear(5, 5, bias=False)), nn.Linear(5, 3))


def handed_over():
    """A weight used by a module that does not have it; the root, which has it, is under way."""

    class Product(nn.Sequential):
        def forward(self, x, weight):
            return self[0](torch.nn.functional.linear(x, weight))

    class Root(nn.Sequential):
        def forward(self, x):
            return self[2](self[1](self[0](x), self[0].weight))

    alone = Root(nn.Linear(5, 5, bias=False), Product(nn.Tanh()), nn.Linear(5, 3)).double()
    return fully_shard(copy.deepcopy(alone), mesh=line()), alone


def each_layer(make):
    def build():
        alone = make().double()
        model = copy.deepcopy(alone)
        for module in list(model.modules()):
            if isinstance(module, nn.Linear):
                fully_shard(module, mesh=line())
        return fully_shard(model, mesh=line()), alone

    return build


def in_groups():
    """Tied tables in one group, as torch wants them."""
    alone = gpt().double()
    model = copy.deepcopy(alone)
    for block in model.blocks:
        fully_shard(block, mesh=line())
    fully_shard([model.tokens, model.norm, model.head], mesh=line())
    return fully_shard(model, mesh=line()), alone


def columns(p):
    return Shard(1) if p.dim() > 1 and p.shape[1] % dist.get_world_size() == 0 else Shard(0)


WAYS = {
    "resharded after the forward": copied(gpt, reshard_after_forward=True),
    "not resharded after the forward": copied(gpt, reshard_after_forward=False),
    "checkpointed": copied(gpt, recompute),
    "checkpointed by torch.distributed": copied(gpt, recompute_composably),
    "partly frozen": copied(gpt, before=freeze),
    "in groups": in_groups,
    "every layer": each_layer(mlp),
    "by columns": copied(mlp, shard_placement_fn=columns),
    "a vmap leaf": copied(with_a_vmap_leaf),
    "a functional use": copied(functional),
    "a weight handed over": handed_over,
}


def ways():
    return {name: followed(build) for name, build in WAYS.items()}


def test_whatever_way_it_is_sharded(two):
    for found in two(ways):
        assert found.keys() == WAYS.keys()
        assert max(max(one) for one in found.values()) <= 1e-9, found


def compiled():
    """With a break in the graph at every layer."""
    model, alone = made("gpt")
    stats, expected = gradstats.attach(model), gradstats.attach(alone)
    every = list(batches("gpt", 2))
    stats.probe(mine(every[0][0]))
    traced = torch.compile(model, backend="eager")
    largest = 0.0
    for x, y in every:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Dynamo's, of FSDP's tensors
            loss_of(traced(mine(x)), mine(y)).backward()
        loss_of(alone(x), y).backward()
        largest = max(largest, apart(stats, expected, "second_moment"))
        model.zero_grad()
        alone.zero_grad()
    return largest


def test_compiled(two):
    assert max(two(compiled)) <= 1e-12


def replicated():
    """Two replicas of two shards each."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    return followed(copied(gpt, mesh=mesh), 3)


@pytest.mark.slow
def test_replicas_of_shards(four):
    assert max(max(found) for found in four(replicated)) <= 1e-9


def in_bfloat16(reduce):
    """Layers compute in bfloat16: per-example contributions are those of a model that is in bfloat16."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=reduce)
    model, alone = made("mlp", torch.float32, mp_policy=policy)
    alone.bfloat16()
    stats, expected = gradstats.attach(model), gradstats.attach(alone)
    largest = 0.0
    for accumulated in range(2):
        x, y = next(batches("mlp", 1, torch.float32))
        model.set_requires_gradient_sync(bool(accumulated))
        loss_of(model(mine(x)), mine(y)).backward()
        loss_of(alone(x.bfloat16()), y).backward()
    for p in expected.parameters():
        assert stats.second_moment[p].dtype == torch.float32
        largest = max(largest, distance(stats.second_moment[p], expected.second_moment[p]))
    assert stats.batch_size == 2 * len(x)
    return largest


@pytest.mark.parametrize("reduce", [torch.float32, None])
def test_mixed_precision_squares_in_float32(two, reduce):
    assert max(two(in_bfloat16, reduce)) <= 1e-5


def in_float32(name):
    """A sharded run at the tuned batch size, and those of torch's Adam with examples in other orders."""

    def train(model, optimizer, share, seed=None):
        shuffle = torch.Generator().manual_seed(seed or 0)
        for x, y in batches(name, 50, torch.float32):
            order = torch.arange(len(x)) if seed is None else torch.randperm(len(x), generator=shuffle)
            optimizer.zero_grad()
            loss_of(model(share(x[order])), share(y[order])).backward()
            optimizer.step()
        return torch.cat([whole(p).detach().flatten() for p in model.parameters()])

    model, alone = made(name, torch.float32)
    gradstats.attach(model)
    ours = train(model, BatchInvariantAdam(model.parameters(), lr=0.01, batch_size=B), mine)
    theirs = []
    for seed in (None, 1, 2, 3, 4):
        other = copy.deepcopy(alone)
        theirs.append(train(other, torch.optim.Adam(other.parameters(), lr=0.01), lambda t: t, seed))
    own = max((a - b).norm() for a, b in itertools.combinations(theirs, 2))
    return float(torch.stack([(ours - one).norm() for one in theirs]).median()), float(own)


@pytest.mark.parametrize("name", ["mlp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("convnet", "gpt"))])
def test_in_float32_no_further_than_torch_from_itself(two, name):
    for apart_from_torch, own in two(in_float32, name):
        assert apart_from_torch <= own
