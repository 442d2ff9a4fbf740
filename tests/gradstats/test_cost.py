"""What a step with statistics costs, counted rather than timed."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.fx import Node
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from experiments.benchmarks.meter import Profiled
from experiments.gpt import GPT
from gradstats import attach
from gradstats.choice import unmeasured
from gradstats.contribution import CACHED, Contribution
from gradstats.forms.convolution_weight import ConvolutionWeight, Settings
from gradstats.forms.dense import PositionSum
from gradstats.forms.outer import Outer, OuterSum
from gradstats.forms.products import Products
from gradstats.forms.rows import Rows
from gradstats.forms.streamed import Streamed
from gradstats.native import outer_sum
from gradstats.sums import Reduction


def compiler():
    """Whether there is one of C++."""
    return outer_sum.serves(torch.randn(1, 1, 1), torch.randn(1, 1, 1))


# All contributions together would be 64 parameters.
EXAMPLES, POSITIONS, OUT, IN = 64, 20, 256, 192
MATMUL = 2 * EXAMPLES * POSITIONS * OUT * IN  # FLOPs of the gradient
NUMBERS = EXAMPLES * POSITIONS * OUT  # in the output's gradient
SQUARES, NORMS = "sum_of_squares", "squared_norms"


def outer():
    return Outer(torch.randn(EXAMPLES, OUT), torch.randn(EXAMPLES, IN))


def linear():
    return OuterSum(torch.randn(EXAMPLES, POSITIONS, OUT), torch.randn(EXAMPLES, POSITIONS, IN))


def embedding():
    return Rows(torch.randint(0, 100, (EXAMPLES, POSITIONS)), torch.randn(EXAMPLES, POSITIONS, OUT), 100)


def bilinear():
    return Products(*(torch.randn(EXAMPLES, 1, size) for size in (OUT, 16, 12)))


def normalisation():
    return PositionSum(torch.randn(EXAMPLES, POSITIONS, OUT), 1)


def convolution(transposed=False, groups=1, channels=32, size=4):
    """3x3, the padding of which keeps the size; a transposed one has the channels of its weight the other way round."""
    settings = Settings([1, 1], [1, 1], [1, 1], transposed, [0, 0], groups)
    of_rows, others = torch.randn(EXAMPLES, 2 * channels, size, size), torch.randn(EXAMPLES, channels, size, size)
    d, x = (others, of_rows) if transposed else (of_rows, others)
    return ConvolutionWeight(d, x, torch.randn(2 * channels, channels // groups, 3, 3), settings)


WINDOWS = 2 * EXAMPLES * 16 * 64 * 32 * 9  # FLOPs of the gradient of `convolution()`
WEIGHT = 64 * 32 * 9
GRAM = 2 * EXAMPLES * POSITIONS**2 * (OUT + IN)


class Way(NamedTuple):
    """FLOPs of torch's matmuls and convolutions, and numbers in memory beside operands and results."""

    make: Callable[[], Contribution]
    reduce: Callable[[Any, list[str]], Reduction]
    sums: tuple[str, ...]
    flops: int
    numbers: int


def named(name):
    return lambda contribution, sums: contribution.ways(sums)[name]()


def native(outer_product, sums):
    """The kernel's own are FLOPs of both matmuls, which torch cannot count."""
    return outer_sum.sums(outer_product.d.unsqueeze(1), outer_product.a.unsqueeze(1), sums)


WAYS = {
    # A second matmul, of squares of the operands.
    "outer, products": Way(outer, Contribution.sums, (SQUARES,), 4 * EXAMPLES * OUT * IN, EXAMPLES * (OUT + IN)),
    "outer, norms": Way(outer, Contribution.sums, (NORMS,), 2 * EXAMPLES * OUT * IN, EXAMPLES * (OUT + IN)),
    "outer, native": Way(outer, native, (SQUARES,), 0, 0),
    # The kernel's own are FLOPs of the gradient, which torch cannot count; parts of operands and norms, a thread each.
    "linear, native": Way(linear, named("native"), (SQUARES,), 0, 128 * (192 + 192) + 4096),
    "linear, stream": Way(linear, lambda c, sums: Streamed.direct(c, sums), (SQUARES,), MATMUL, 2 * OUT * IN),
    "linear, blocks": Way(linear, OuterSum.from_blocks, (SQUARES,), MATMUL, 3 * CACHED),
    "linear, gram": Way(linear, lambda c, _: c.gram(), (NORMS,), MATMUL + GRAM, 3 * EXAMPLES * POSITIONS**2),
    # Rows summed over equal ids, and their squares; ids of 64 bits and where they are, in order and out of it.
    "embedding": Way(embedding, Rows.direct, (SQUARES, NORMS), 0, 2 * NUMBERS + 16 * EXAMPLES * POSITIONS),
    # Squares of what is summed over positions already.
    "normalisation": Way(normalisation, PositionSum.direct, (SQUARES, NORMS), 0, EXAMPLES * OUT),
    "bilinear": Way(
        bilinear, Products.direct, (SQUARES, NORMS), 4 * EXAMPLES * OUT * 16 * 12, EXAMPLES * (OUT + 16 + 12 + 16 * 12)
    ),
    "convolution, examples": Way(convolution, named("examples"), (SQUARES,), WINDOWS, 3 * WEIGHT),
    "convolution, norms by examples": Way(convolution, named("examples"), (NORMS,), WINDOWS, 2 * WEIGHT + 16 * 32 * 9),
    "convolution, unfolded": Way(convolution, named("unfolded"), (SQUARES,), WINDOWS, 2 * CACHED),
    "transposed, examples": Way(partial(convolution, True), named("examples"), (SQUARES,), WINDOWS, 3 * WEIGHT),
    "transposed, unfolded": Way(partial(convolution, True), named("unfolded"), (SQUARES,), WINDOWS, 2 * CACHED),
    # 14 examples at a time, and torch counts as if every output channel saw the channels of all of them.
    "convolution, grouped": Way(
        convolution, named("grouped"), (SQUARES,), (4 * 14**2 + 8**2) * WINDOWS // EXAMPLES, 5 * CACHED
    ),
}


@pytest.mark.parametrize("name", WAYS)
def test_way(name, monkeypatch):
    make, reduce, sums, flops, numbers = WAYS[name]
    contribution = make()
    if not name.endswith("native"):
        monkeypatch.setattr(outer_sum, "serves", lambda d, a: False)
    elif not compiler():
        pytest.skip("no C++ compiler")
    with unmeasured():
        with FlopCounterMode(display=False) as counter:  # the first run fills what libraries keep, too
            reduce(contribution, list(sums))
        meter = Profiled()
        with meter.contestant(), meter.steps():
            gradient, found = reduce(contribution, list(sums))
    results = gradient.nbytes + sum(value.nbytes for value in found.values())
    assert found.keys() == set(sums)
    assert counter.get_total_flops() == flops
    assert meter.peak <= results + 4 * numbers


def step_of(model, x):
    """A step's forward and backward pass, and the end of its gradients."""

    def step():
        model(x).square().mean().backward()

    def end():
        model.zero_grad()
        x.grad = None

    return step, end


def flops(step):
    run, end = step
    with FlopCounterMode(display=False) as counter:
        run()
    end()
    return counter.get_total_flops()


def peak(step):
    """Bytes of a third step (the two before it may probe), with what those have left and it may let go.

    All that is let go was allocated under this meter: for what was not, the profiler may report another tensor's bytes,
    that of an earlier meter at the same address.
    """
    run, end = step
    meter = Profiled()
    with meter.contestant():
        for _ in range(2):
            run()
            end()
        with meter.steps():
            run()
        end()
    return meter.peak


@pytest.mark.parametrize(
    ("statistics", "shape", "kernel", "expected"),
    [
        # Forward, input gradient, weight gradient: 3 matmuls. Without positions the squares are one more per layer.
        (("second_moment",), (16, 64), False, 4 / 3),
        (("norms",), (16, 64), False, 1.0),
        # With positions the stream of examples IS the weight gradient.
        (("second_moment",), (4, 32, 64), False, 1.0),
        (("second_moment", "variance", "norms"), (4, 32, 64), False, 1.0),
        # The kernel's work replaces the weight gradient's, which torch would count; for few numbers it is not called.
        (("second_moment",), (16, 64), True, 4 / 3),
        (("second_moment",), (512, 64), True, 2 / 3),
        (("second_moment", "variance", "norms"), (4, 32, 64), True, 2 / 3),
    ],
)
def test_matmuls_of_a_step(statistics, shape, kernel, expected, monkeypatch):
    x = torch.randn(shape, requires_grad=True)
    model = nn.Linear(64, 64)
    plain = flops(step_of(model, x))
    attach(model, *statistics).probe(x)
    if not kernel:
        monkeypatch.setattr(outer_sum, "serves", lambda d, a: False)
    elif not compiler():
        pytest.skip("no C++ compiler")
    with unmeasured():
        assert flops(step_of(model, x)) == pytest.approx(expected * plain, rel=0.01)


def perceptron(*sizes):
    pairs = [(nn.Linear(*pair), nn.ReLU()) for pair in pairwise(sizes)]
    return nn.Sequential(*[layer for pair in pairs for layer in pair][:-1])


SIZES = (784, 1024, 1024, 10)


@pytest.mark.parametrize(("options", "share"), [({}, 1.0), ({"fraction": 0.25}, 0.25), ({"every": 4}, 0.0)])
def test_matmuls_of_the_perceptron(options, share, monkeypatch):
    """The second matmul of every layer is over the examples that are gathered: with all of them, 1.39 times as many."""
    monkeypatch.setattr(outer_sum, "serves", lambda d, a: False)
    model, x = perceptron(*SIZES), torch.randn(256, SIZES[0])
    weights = [i * o for i, o in pairwise(SIZES)]
    plain = 2 * 256 * (3 * sum(weights) - weights[0])  # nothing differentiates by the input
    assert flops(step_of(model, x)) == plain
    stats = attach(model, **options)
    stats.probe(x)
    with unmeasured():
        counted = [flops(step_of(model, x)) for _ in range(3)][-1]  # the two before it may probe
    assert counted == plain + share * 2 * 256 * sum(weights)
    assert share < 1 or counted / plain == pytest.approx(1.39, abs=0.005)


def test_matmuls_of_some_examples_with_positions(monkeypatch):
    """The batch matmul for the gradient, and the stream of those that are drawn."""
    monkeypatch.setattr(outer_sum, "serves", lambda d, a: False)
    model, x = nn.Linear(64, 64), torch.randn(8, 32, 64)
    plain = flops(step_of(model, x))
    attach(model, fraction=0.25).probe(x)
    with unmeasured():
        assert flops(step_of(model, x)) == plain + plain / 2 / 4


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_matmuls_of_a_compiled_step():
    """Those of torch, for which the kernel is no match in a graph; Dynamo does not trace under a counter's mode."""
    found = []

    def counted(graph, inputs):
        for node in graph.graph.nodes:
            if (formula := flop_registry.get(getattr(node.target, "overloadpacket", None))) is not None:
                operands = [a.meta["val"] if isinstance(a, Node) else a for a in node.args]
                found.append(formula(*operands, out_val=node.meta["val"]))
        return make_boxed_func(graph)

    torch._dynamo.reset()
    model, x = perceptron(64, 96, 48, 10), torch.randn(16, 64)
    plain = flops(step_of(model, x))
    attach(model).probe(x)
    compiled = torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=counted))
    compiled(x).square().mean().backward()
    torch._dynamo.reset()
    assert sum(found) == plain + 2 * 16 * (64 * 96 + 96 * 48 + 48 * 10)


# Activations that are more than the parameters, and fewer.
GPTS = {
    f"{name}, {what}": (lambda words=words, t=t, tied=tied: GPT(words, 128, 2, 4, t, tied=tied), words, (b, t))
    for name, tied in (("tied", True), ("untied", False))
    for what, words, b, t in (("activations", 1000, 8, 32), ("parameters", 100, 4, 16))
}


@pytest.mark.parametrize("name", GPTS)
@pytest.mark.parametrize(
    ("statistic", "buffers", "options"),
    [("second_moment", 1, {}), ("norms", 0, {}), ("variance", 1, {}), ("second_moment", 1, {"fraction": 0.25})],
    ids=["second moment", "norms", "variance", "fraction"],
)
def test_memory_of_a_step(name, statistic, buffers, options):
    """Plain, one buffer like the parameters where the statistic is shaped like them, and a twentieth; the gradient of
    one layer more, where that of a part of the examples is made beside it."""
    make, words, shape = GPTS[name]
    model, x = make(), torch.randint(0, words, shape)
    step = step_of(model, x)
    plain = peak(step)
    attach(model, statistic, **options).probe(x)
    parameters = sum(p.nbytes for p in model.parameters())
    part = max(p.nbytes for p in model.parameters()) if options else 0
    assert peak(step) <= 1.05 * plain + buffers * parameters + part


@pytest.mark.parametrize("name", GPTS)
def test_a_window_that_is_not_gathered(name):
    """Plain torch's, but for the memory of the sums that were gathered last, which the next ones find where it was."""
    make, words, shape = GPTS[name]
    model, x = make(), torch.randint(0, words, shape)
    step = step_of(model, x)
    plain = peak(step), flops(step)
    attach(model, every=4).probe(x)
    kept = sum(p.nbytes for p in model.parameters())
    assert abs(peak(step) - kept - plain[0]) <= 64  # the second after the one that is gathered
    assert flops(step) == plain[1]


# Numbers beside plain torch's in the backward pass of a layer: n examples of t positions and c channels.
N, T, C = 64, 20, 32
LAYERS = {
    # What is normalised and its product with d; sums over positions and their squares, of one parameter at a time.
    "layer norm": (lambda: nn.LayerNorm(C), (N, T, C), 2 * N * T * C + 2 * N * C),
    # torch's own, of several kernels, keeps more.
    "rms norm": (lambda: nn.RMSNorm(C), (N, T, C), 0),
    # Sums over positions come from torch's kernel.
    "group norm": (lambda: nn.GroupNorm(4, C), (N, C, T), 3 * N * C),
}


@pytest.mark.parametrize("statistic", ["second_moment", "norms"])
@pytest.mark.parametrize("name", LAYERS)
def test_memory_of_a_normalisation_layer(name, statistic):
    make, shape, numbers = LAYERS[name]
    model, d = make(), torch.randn(shape)
    x = torch.randn(shape, requires_grad=True)
    step = partial(lambda model, x, d: model(x).backward(d), model, x, d), step_of(model, x)[1]
    plain = peak(step)
    attach(model, statistic).probe(x)
    results = {"second_moment": 2 * C, "norms": 2 * N}[statistic]
    assert peak(step) <= plain + 4 * (numbers + results)


WIDE = {
    "few positions": (lambda: nn.Linear(1024, 1024), torch.randn(8, 4, 1024)),
    "embedding": (lambda: nn.Embedding(10_000, 32), torch.arange(32 * 16).reshape(32, 16) % 7),
}


@pytest.mark.parametrize("name", WIDE)
def test_memory_of_norms_beside_a_large_gradient(name):
    """Nothing of the size of activations beside it (32 KiB at least), only what has a few numbers an example."""
    make, x = WIDE[name]
    model = make()
    step = step_of(model, x)
    plain = peak(step)
    attach(model, "norms").probe(x)
    assert peak(step) <= plain + 8192


@pytest.mark.parametrize(("size", "sums"), [(1, 1), (4, 2)])
def test_memory_of_micro_batches(size, sums):
    """The sums, of squares and for estimates of gradients, and the gradients of the pass under way: no others."""
    model, x = perceptron(64, 256, 256), torch.randn(16, 64)
    kept = sum(p.nbytes for p in model.parameters())

    def step():
        for part in x.split(size):
            model(part).square().mean().backward()

    plain = peak((step, model.zero_grad))
    attach(model, engine="microbatch")
    assert peak((step, model.zero_grad)) <= plain + (1 + sums) * kept + 4096


def test_memory_of_a_step_after_others():
    """Neither a temporary of the bias beside the weight's statistic, nor the statistics of the step before."""
    if not compiler():
        pytest.skip("no C++ compiler")
    model, x = perceptron(300, 400, 400), torch.randn(256, 300)
    step = step_of(model, x)
    plain = peak(step)
    attach(model, "second_moment").probe(x)
    assert peak(step) <= plain + 1.1 * sum(p.nbytes for p in model.parameters())


def test_memory_of_a_variance_that_is_read():
    """One beside the result: the mean is squared in place."""
    model, x = nn.Linear(256, 256, bias=False), torch.randn(8, 256)
    stats = attach(model, "variance")
    model(x).square().mean().backward()
    assert peak((lambda: stats.variance["weight"], lambda: None)) <= 2 * model.weight.nbytes + 64
