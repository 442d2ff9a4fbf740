"""Under torch.compile a model gathers what it does without, in as few graphs as plain torch; what cannot, says so."""

import copy
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils._pytree import tree_leaves

import gradstats
from experiments.gpt import GPT
from gradstats import CoverageError, LifetimeError, MissingStatistic, attach
from gradstats.optim import BatchInvariantAdam
from tests import compiling, layers, oracle

ALL = ("second_moment", "variance", "norms")
EXACT = 1e-9  # float64
B = 6
pytestmark = compiling.MARKS


class Attached(NamedTuple):
    model: nn.Module
    call: Callable[..., Any]  # the model, compiled or not
    stats: Any
    draws: torch.Generator  # of the examples


def network():
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def attached(model, statistics=ALL, **options):
    """The model as it is, attached."""
    return Attached(model, model, attach(model, *statistics, **options), torch.Generator().manual_seed(0))


def compiled(it, x, backend="aot_eager", fullgraph=True):
    """The same compiled, after a probe of x."""
    oracle.call(it.stats.probe, x)
    return it._replace(call=torch.compile(it.model, fullgraph=fullgraph, backend=backend))


def twins(make=network, x=None, statistics=ALL, **options):
    """A compiled model and its eager copy."""
    model = make()
    x = torch.randn(B, 5).double() if x is None else x
    return compiled(attached(copy.deepcopy(model), statistics), x, **options), attached(model, statistics)


def batch(it, n=B):
    dtype = next(p.dtype for p in it.model.parameters())
    x = torch.randn(n, 5, generator=it.draws, dtype=torch.float64)
    return x.to(dtype), torch.randint(0, 3, (n,), generator=it.draws)


def loss_of(it, n=B):
    x, y = batch(it, n)
    return F.cross_entropy(it.call(x), y)


def worst(found, expected):
    """The largest error of a gradient or a statistic."""

    def error(a, b):
        assert a.keys() == b.keys()
        whole = oracle.whole(b)
        return max(oracle.error(a[name], b[name], whole) for name in b)

    assert found.stats.batch_size == expected.stats.batch_size
    gradients = [{k: p.grad for k, p in it.model.named_parameters() if p.grad is not None} for it in (found, expected)]
    errors = [error(*gradients)]
    for name in expected.stats.statistics:
        power = 2 if name == "norms" else 1  # as the oracle compares them
        tables = [{k: tree_leaves(v)[0] for k, v in it.stats.read(name).items()} for it in (found, expected)]
        errors.append(error(*({k: v.double() ** power for k, v in table.items()} for table in tables)))
    return max(errors)


# Sizes


class Problem(NamedTuple):
    make: Callable[[], nn.Module]
    batch: Callable[[int], tuple[torch.Tensor, torch.Tensor]]
    sizes: tuple[int, ...]


def convolutions():
    def stage(channels):
        return nn.Conv2d(channels, 8, 3, padding="same"), nn.GroupNorm(4, 8), nn.ReLU(), nn.MaxPool2d(2)

    return nn.Sequential(*stage(3), *stage(8), nn.Flatten(), nn.Linear(8 * 16, 5))


PROBLEMS = {
    "mlp": Problem(
        lambda: nn.Sequential(nn.Linear(12, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 5)),
        lambda n: (torch.randn(n, 12), torch.randint(0, 5, (n,))),
        (8, 16, 32, 5),
    ),
    "gpt": Problem(
        lambda: GPT(words=50, width=32, layers=2, heads=4, positions=16),
        lambda n: (torch.randint(0, 50, (n, 16)), torch.randint(0, 50, (n, 16))),
        (8, 16, 32, 5),
    ),
    # All from 16 on: torch itself compiles a convolution once more for the sizes below.
    "convolutions": Problem(
        convolutions, lambda n: (torch.randn(n, 3, 16, 16), torch.randint(0, 5, (n,))), (16, 24, 32, 17)
    ),
}


def errors_by_size(problem, dtype, backend):
    def drawn(n):
        x, y = problem.batch(n)
        return x.to(dtype) if x.is_floating_point() else x, y

    pair = twins(lambda: problem.make().to(dtype), drawn(8)[0], backend=backend)
    for n in problem.sizes:
        x, y = drawn(n)
        for it in pair:
            it.model.zero_grad()
            F.cross_entropy(it.call(x).flatten(0, -2), y.flatten()).backward()
        assert pair[0].stats.batch_size == n
        yield worst(*pair)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, EXACT), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", ["mlp", "convolutions"])
def test_a_new_batch_size_compiles_at_most_once_more(name, dtype, error):
    backend = compiling.Counting()
    assert max(errors_by_size(PROBLEMS[name], dtype, backend)) <= error
    assert backend.graphs <= 2


def nodes(problem, n):
    """Names of the operators of the one graph's forward and backward pass over n examples, of which it is made anew."""
    found = []

    def traced(graph, inputs):
        found.append([str(node.target) for node in graph.graph.nodes])
        return make_boxed_func(graph)

    torch._dynamo.reset()
    it, (x, y) = attached(problem.make()), problem.batch(n)
    it.stats.probe(x)
    call = torch.compile(it.model, fullgraph=True, dynamic=False, backend=aot_autograd(fw_compiler=traced))
    F.cross_entropy(call(x).flatten(0, -2), y.flatten()).backward()
    assert len(found) == 2 and it.stats.batch_size == n
    return found


@pytest.mark.parametrize(("name", "loops"), [("mlp", 0), ("gpt", 2 + 2 * 4 + 1), ("convolutions", 2)])
def test_no_graph_breaks_and_a_graph_that_does_not_grow_with_the_batch(name, loops):
    """Loops over examples are an operator each: of embeddings, weights of Linear with positions, and convolutions."""
    few, many = (nodes(PROBLEMS[name], n) for n in (4, 64))
    assert [len(graph) for graph in few] == [len(graph) for graph in many]
    assert many[1].count("gradstats.sums.default") == loops


@pytest.mark.slow
@pytest.mark.parametrize("name", PROBLEMS)
def test_models_under_inductor(name):
    backend = compiling.Counting("inductor")
    assert max(errors_by_size(PROBLEMS[name], torch.float32, backend)) <= 1e-5
    assert backend.graphs <= 2


# Ways of using a model: the compiled one and the eager one go through them in step, and are compared at every yield


def accumulates(it):
    for zero in (lambda: it.model.zero_grad(), lambda: it.model.zero_grad(set_to_none=False)):
        zero()
        for n in (4, 7):
            loss_of(it, n).backward()
            yield


def declares_new_examples(it):
    first = loss_of(it)
    it.stats.new_examples()
    (first + loss_of(it)).backward()
    yield


def evaluates_in_between(it):
    loss = loss_of(it)
    for mode in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
        with mode:
            loss_of(it, 9)
    loss.backward()
    yield


def differentiates_by_autograd_grad(it):
    torch.autograd.grad(loss_of(it), list(it.model.parameters()))
    with pytest.raises(MissingStatistic, match="no backward pass"):
        it.stats.second_moment["0.weight"]
    loss_of(it).backward()
    yield


def differentiates_by_input(it):
    x, y = batch(it)
    x.requires_grad_()
    F.cross_entropy(it.call(x), y).backward()
    it.model.register_buffer("input_gradient", x.grad)
    yield


def fails_in_between(it):
    loss = loss_of(it)
    with pytest.raises(Exception, match="shapes|reduction dim"):
        it.call(torch.randn(B, 8).double())
    loss.backward()
    yield


def freezes(it):
    for trainable in (True, False):
        it.model[0].weight.requires_grad_(trainable)
        it.model.zero_grad()
        loss_of(it).backward()
        yield


def replaces_a_parameter(it):
    loss_of(it).backward()
    it.model.zero_grad()
    it.model[2].weight = nn.Parameter(torch.eye(3, 4).double())
    loss_of(it).backward()
    yield


def changes_dtype(it):
    it.model.float()
    loss_of(it).backward()
    assert it.stats.second_moment["0.weight"].dtype == torch.float32
    yield


def runs_under_autocast(it):
    it.model.float()
    x, y = batch(it)
    with torch.autocast("cpu", torch.bfloat16):
        output = it.call(x)
    assert output.dtype == torch.bfloat16
    F.cross_entropy(output.float() * 1024, y).backward()
    assert it.model[0].weight.grad.dtype == it.stats.second_moment["0.weight"].dtype == torch.float32
    yield


def trains(it):
    optimizer = BatchInvariantAdam(it.model.parameters(), lr=1e-2, batch_size=4)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(it).backward()
        yield
        optimizer.step()


def is_copied(it):
    """A copy of a compiled model compiles what the original did, for weights and statistics of its own."""
    loss_of(it).backward()
    for duplicate in (copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))):
        other = duplicate(it.model)
        with torch.no_grad():
            for p in other.parameters():
                p.mul_(0.5)
                p.grad = None
        call = other if it.call is it.model else torch.compile(other, fullgraph=True, backend="aot_eager")
        loss_of(it._replace(model=other, call=call), 4).backward()
        assert it.stats.batch_size == B
        yield other, gradstats.attached(other)


FLOAT32 = 1e-5
USES = {
    accumulates: EXACT,
    declares_new_examples: EXACT,
    evaluates_in_between: EXACT,
    differentiates_by_autograd_grad: EXACT,
    differentiates_by_input: EXACT,
    fails_in_between: EXACT,
    freezes: EXACT,
    replaces_a_parameter: EXACT,
    changes_dtype: FLOAT32,
    runs_under_autocast: FLOAT32,
    trains: EXACT,
    is_copied: EXACT,
}


@pytest.mark.parametrize("use", USES)
def test_uses(use):
    pair = twins()
    for copies in zip(*map(use, pair), strict=True):
        used = [
            it if own is None else it._replace(model=own[0], stats=own[1]) for it, own in zip(pair, copies, strict=True)
        ]
        assert worst(*used) <= USES[use]
    found, expected = (it.model.state_dict() for it in pair)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


def siamese(it):
    (loss_of(it) + loss_of(it)).backward()


def second_backward(it):
    loss = loss_of(it)
    loss.backward(retain_graph=True)
    loss.backward()


def penalty(it):
    (loss_of(it) + it.model[0].weight.square().sum()).backward()


REFUSED = {
    siamese: (LifetimeError, "call both from the forward of one module"),
    second_backward: (LifetimeError, "backpropagated twice"),
    penalty: (CoverageError, r"'0.weight' \(4, 5\) receives gradient from outside"),
}


# Without this torch itself refuses to keep the graph of most compiled models.
@torch._functorch.config.patch(donated_buffer=False)
def test_refused_and_usable_afterwards():
    pair = twins()
    for use, (error, match) in REFUSED.items():
        with pytest.raises(error, match=match):
            use(pair[0])
        for it in pair:
            it.draws.manual_seed(0)
            it.model.zero_grad()
            loss_of(it).backward()
        assert worst(*pair) <= EXACT, use


# What is compiled: parts, whole steps, other calls


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 5))

    def forward(self, x):
        return x + self.inner(x).tanh()


def test_blocks_compiled_one_by_one_share_their_code():
    backend = compiling.Counting()
    model = nn.Sequential(nn.Linear(5, 5), *(Residual() for _ in range(3)), nn.Linear(5, 3)).double()
    pair = attached(copy.deepcopy(model)), attached(model)
    pair[0].stats.probe(torch.randn(B, 5).double())
    for block in pair[0].model[1:-1]:
        block.compile(fullgraph=True, backend=backend)
    for n in (4, 7, 9):
        for it in pair:
            it.model.zero_grad()
            loss_of(it, n).backward()
        assert worst(*pair) <= EXACT
    assert backend.graphs <= 2


def test_forward_and_loss_in_one_graph():
    found, expected = twins()
    step = torch.compile(lambda x, y: F.cross_entropy(found.model(x), y), fullgraph=True, backend="aot_eager")
    step(*batch(found)).backward()
    loss_of(expected).backward()
    assert worst(found, expected) <= EXACT


class Branches(nn.Module):
    """Keyword arguments only, a dictionary of outputs, dropout."""

    def __init__(self):
        super().__init__()
        self.body, self.drop, self.head = nn.Linear(5, 4), nn.Dropout(), nn.Linear(4, 3)

    def forward(self, *, x, scale=1.0):
        hidden = self.drop(self.body(x))
        return {"logits": self.head(hidden) * scale, "hidden": hidden}


def test_keyword_arguments_and_dictionaries():
    pair = twins(lambda: Branches().double(), x={"x": torch.randn(B, 5).double()})
    for it in pair:
        torch.manual_seed(0)
        x, y = batch(it)
        F.cross_entropy(it.call(x=x, scale=2.0)["logits"], y).backward()
    assert worst(*pair) <= EXACT


def test_batch_of_one():
    """Of which there is no variance."""
    pair = twins(statistics=("second_moment", "norms"))
    for it in pair:
        loss_of(it, 1).backward()
    assert worst(*pair) <= EXACT


def test_every_statistic():
    """Also those that loop over blocks of examples, outside of the graph."""
    statistics = (*ALL, "sign_mean", "abs_mean", "max_abs", "gram", "cosine_similarity", "histogram", "projection")
    pair = twins(statistics=statistics)
    for it in pair:
        loss_of(it).backward()
    assert worst(*pair) <= EXACT


@pytest.mark.parametrize("layer", [nn.GroupNorm(2, 4), nn.InstanceNorm1d(4, affine=True)], ids=["group", "instance"])
@pytest.mark.parametrize("options", [{}, {"fraction": 0.5}], ids=["all examples", "some"])
def test_sums_outside_of_the_graph_of_what_a_kernel_adds_up(layer, options):
    """torch's kernel for the layer adds up the positions: their contributions are never in the graph."""
    x, y = torch.randn(B, 5, 6).double(), torch.randn(B, 4, 6).double()
    model = nn.Sequential(nn.Conv1d(5, 4, 1), layer).double()
    pair = [attached(copy.deepcopy(model), ("second_moment", "abs_mean"), **options) for _ in range(2)]
    pair[0] = compiled(pair[0], x)
    for it in pair:
        F.mse_loss(it.call(x), y).backward()
    assert worst(*pair) <= EXACT


def test_what_is_exported_is_the_model_as_it_was():
    model, x = nn.Sequential(layers.OwnsParameters(), nn.Linear(4, 3)), torch.randn(B, 2, 4)
    expected = torch.export.export(model, (x,)).graph_module.code
    stats = attach(model)
    assert torch.export.export(model, (x,)).graph_module.code == expected
    model(x).sum().backward()
    assert stats.batch_size == B


def test_detached_compiled_and_attached_again():
    found, expected = twins()
    loss_of(found).backward()
    found.stats.detach()
    found = found._replace(call=torch.compile(found.model, fullgraph=True, backend="aot_eager"))
    loss_of(found, 4).backward()
    assert found.stats.batch_size == B
    found = found._replace(stats=attach(found.model, *ALL))
    found.stats.probe(batch(found)[0])
    for it in (found, expected):
        it.draws.manual_seed(0)
        it.model.zero_grad()
        loss_of(it).backward()
    assert worst(found, expected) <= EXACT


# What cannot be in a graph: refused under fullgraph, and exact outside of the graph without


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.body, self.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x):
        return self.head(self.body(self.tokens(x)))


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.last(F.linear(self.first(x), self.first.weight))


class Flattened(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x):
        return self.layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])


OUTSIDE = {
    "shared parameter": (Tied, lambda: torch.randint(0, 9, (B, 4)), "Leaf.compiling"),
    "functional use": (Functional, lambda: torch.randn(B, 5).double(), "Leaf.compiling"),
    "flattened positions": (Flattened, lambda: torch.randn(B, 2, 5).double(), "Leaf.compiling"),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_outside_of_the_graph(name):
    make, draw, reason = OUTSIDE[name]
    x, weights = draw(), torch.rand(B).double()
    pair = twins(lambda: make().double(), x, fullgraph=False)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=reason):
        torch.compile(pair[0].model, fullgraph=True, backend="aot_eager")(x)
    for it in pair:
        oracle.coupled_loss(it.call(x), weights).backward()
    assert worst(*pair) <= EXACT


def test_not_probed_without_fullgraph():
    """The first call is probed as an eager one is, and later ones are compiled."""
    model = network()
    found, expected = attached(copy.deepcopy(model)), attached(model)
    found = found._replace(call=torch.compile(found.model, backend="aot_eager"))
    for _ in range(2):
        for it in (found, expected):
            it.model.zero_grad()
            loss_of(it).backward()
        assert worst(found, expected) <= EXACT


def probed(it, x):
    it.stats.probe(x)


def not_probed(it, x):
    pass


def replaced(it, x):
    it.stats.probe(x)
    it.model[2].weight = nn.Parameter(torch.ones(2, 4).double())


SAID = {
    "not probed": (not_probed, (B, 5), r"run stats.probe\(\*batch\) before torch.compile"),
    "unbatched": (probed, (5,), r"run stats.probe\(\*batch\) before torch.compile"),
    "another shape": (replaced, (B, 5), "'2.weight' .* was replaced by one of another shape"),
}


@pytest.mark.parametrize("name", SAID)
def test_errors_name_the_way_out(name):
    prepare, shape, match = SAID[name]
    it = attached(network())
    prepare(it, batch(it)[0])
    with pytest.raises(torch._dynamo.exc.Unsupported, match=match):
        torch.compile(it.model, fullgraph=True, backend="aot_eager")(torch.randn(shape).double())


# The table of layers

ROWS = layers.LAYERS | layers.RECURRENT
# vmap leaves and composites of rules
BREAKING = {"linear, forward overridden", "without a rule", "multi-head attention", "transformer layer"}
BREAKING |= {*layers.CELLS, *layers.RECURRENT}


def check_layer(name, backend):
    row, weights = ROWS[name], torch.rand(layers.B).double()
    model, x = row.make().double(), oracle.to_double(row.x())
    expected = oracle.contributions(model, oracle.coupled_loss, x, weights)
    it = compiled(attached(model), x, backend, fullgraph=name not in BREAKING)
    oracle.coupled_loss(oracle.call(it.call, x), weights).backward()
    assert oracle.worst(oracle.errors(it.stats, expected)) <= EXACT


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_layers(name):
    check_layer(name, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linear, few positions", "embedding", "layer norm", "conv2d", "checkpointed"])
def test_layers_under_inductor(name):
    check_layer(name, "inductor")
