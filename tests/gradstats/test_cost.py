"""What a step with statistics costs, counted rather than timed."""

from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from experiments.benchmarks.meter import Profiled
from experiments.gpt import GPT
from gradstats import attach
from gradstats.choice import unmeasured
from gradstats.compute import call
from gradstats.contribution import CACHED
from gradstats.forms.convolution_weight import ConvolutionWeight, Settings
from gradstats.forms.outer import OuterSum
from gradstats.native import outer_sum
from tests.layers import LAYERS, Row

GPTS = {
    f"gpt, {name}": Row(lambda tied=tied: GPT(50, 16, 2, 2, 8, tied=tied), lambda: torch.randint(0, 50, (5, 8)))
    for name, tied in (("tied", True), ("untied", False))
}


class Waits(TorchDispatchMode):
    """Counts operations whose result, or its size, the host must wait for on an accelerator."""

    WAITING = frozenset(
        {"_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "unique_consecutive", "_unique2"}
    )

    def __init__(self):
        super().__init__()
        self.counted = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        by_mask = name in ("index", "index_put_") and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in self.WAITING or by_mask:
            self.counted[name] += 1
        return func(*args, **(kwargs or {}))


def waits(model, x):
    with Waits() as mode:
        output = call(model, x)
        (output[0] if isinstance(output, tuple) else output).square().mean().backward()
    model.zero_grad()
    return mode.counted


# torch's own EmbeddingBag takes offsets from the device; ours pads the bags, which needs their sizes.
PADDED = {name for name in LAYERS if "offsets" in name}


@pytest.mark.parametrize("statistic", ["second_moment", "norms", "variance"])
@pytest.mark.parametrize("name", sorted((LAYERS | GPTS).keys() - PADDED))
def test_no_host_synchronisation(name, statistic):
    row = (LAYERS | GPTS)[name]
    model, x = row.make(), row.x()
    plain = waits(model, x)
    stats = attach(model, statistic)
    for _ in range(2):  # both probe
        waits(model, x)
    assert stats.batch_size and waits(model, x) == plain


# All contributions together would be 64 parameters.
EXAMPLES, POSITIONS, OUT, IN = 64, 20, 256, 192
MATMUL = 2 * EXAMPLES * POSITIONS * OUT * IN  # FLOPs of the gradient


def linear():
    return OuterSum(torch.randn(EXAMPLES, POSITIONS, OUT), torch.randn(EXAMPLES, POSITIONS, IN))


def convolution(channels=32, size=4):
    """3x3, the padding of which keeps the size."""
    settings = Settings([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    x, d = torch.randn(EXAMPLES, channels, size, size), torch.randn(EXAMPLES, 2 * channels, size, size)
    return ConvolutionWeight(d, x, torch.randn(2 * channels, channels, 3, 3), settings)


WINDOWS = 2 * EXAMPLES * 16 * 64 * 32 * 9  # FLOPs of the gradient of `convolution()`
GRAM = 2 * EXAMPLES * POSITIONS**2 * (OUT + IN)

# Ways to a sum: FLOPs of torch's matmuls and convolutions, and numbers in memory beside operands and results.
WAYS = {
    # The kernel's own are FLOPs of the gradient, which torch cannot count; parts of operands and norms, a thread each.
    ("native", "sum_of_squares"): (linear, 0, 128 * (192 + 192) + 4096),
    ("stream", "sum_of_squares"): (linear, MATMUL, 2 * OUT * IN),
    ("blocks", "sum_of_squares"): (linear, MATMUL, 3 * CACHED),
    ("gram", "squared_norms"): (linear, MATMUL + GRAM, 3 * EXAMPLES * POSITIONS**2),
    ("examples", "sum_of_squares"): (convolution, WINDOWS, 3 * 64 * 32 * 9),
    ("unfolded", "sum_of_squares"): (convolution, WINDOWS, 2 * CACHED),
    # 14 examples at a time, and torch counts as if every output channel saw the channels of all of them.
    ("grouped", "sum_of_squares"): (convolution, (4 * 14**2 + 8**2) * WINDOWS // EXAMPLES, 5 * CACHED),
}


def way_of(name, kind, contribution):
    if name == "gram":
        return contribution.gram
    if name == "blocks":
        return lambda: contribution.from_blocks([kind])
    if name == "stream":
        return lambda: super(OuterSum, contribution).direct([kind])
    return contribution.ways([kind])[name]


@pytest.mark.parametrize(("name", "kind"), WAYS)
def test_way(name, kind, monkeypatch):
    make, flops, numbers = WAYS[name, kind]
    contribution = make()
    if name == "native" and not outer_sum.serves(contribution.d, contribution.a):
        pytest.skip("no C++ compiler")
    if name != "native":
        monkeypatch.setattr(outer_sum, "serves", lambda d, a: False)
    way = way_of(name, kind, contribution)
    with unmeasured():
        way()  # compiles, and fills what libraries keep
        with FlopCounterMode(display=False) as counter:
            way()
        meter = Profiled()
        with meter.contestant(), meter.steps():
            gradient, found = way()
    results = gradient.nbytes + sum(value.nbytes for value in found.values())
    assert counter.get_total_flops() == flops
    assert meter.peak <= results + 4 * numbers


def flops_of_step(model, x):
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    model.zero_grad()
    return counter.get_total_flops()


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
    plain = flops_of_step(model, x)
    attach(model, *statistics).probe(x)
    if not kernel:
        monkeypatch.setattr(outer_sum, "serves", lambda d, a: False)
    elif not outer_sum.serves(torch.randn(1, 1, 1), torch.randn(1, 1, 1)):
        pytest.skip("no C++ compiler")
    with unmeasured():
        assert flops_of_step(model, x) == pytest.approx(expected * plain, rel=0.01)


@pytest.mark.parametrize(("name", "row"), GPTS.items())
@pytest.mark.parametrize(("statistic", "buffers"), [("second_moment", 1), ("norms", 0), ("variance", 1)])
def test_memory_of_a_step(name, row, statistic, buffers):
    """Plain, one buffer like the parameters where the statistic is shaped like them, and a tenth."""

    def peak():
        meter = Profiled()
        with meter.contestant(), meter.steps():
            model(x).square().mean().backward()
        model.zero_grad()
        return meter.peak

    model = GPT(1000, 128, 2, 4, 32, tied="untied" not in name)
    x = torch.randint(0, 1000, (8, 32))
    parameters = sum(p.nbytes for p in model.parameters())
    peak()
    plain = peak()
    attach(model, statistic)
    for _ in range(2):  # both probe
        peak()
    assert peak() <= 1.1 * plain + buffers * parameters


def test_memory_of_a_step_after_others():
    """Neither a temporary of the bias beside the weight's statistic, nor the statistics of the step before."""
    if not outer_sum.serves(torch.randn(1, 1, 1), torch.randn(1, 1, 1)):
        pytest.skip("no C++ compiler")
    model, x = nn.Sequential(nn.Linear(300, 400), nn.ReLU(), nn.Linear(400, 400)), torch.randn(256, 300)

    def peak():
        meter = Profiled()
        with meter.contestant():
            model(x).square().mean().backward()
            model.zero_grad()
            with meter.steps():
                model(x).square().mean().backward()
        model.zero_grad()
        return meter.peak

    plain = peak()
    attach(model, "second_moment").probe(x)
    assert peak() <= plain + 1.1 * sum(p.nbytes for p in model.parameters())
