"""FLOPs by formula, beside those that torch counts of an attached model."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import gradstats
from experiments.errors import UserError
from experiments.gpt import GPT
from experiments.planning.layers import Layer, price
from experiments.planning.trace import OF_CPU, plain
from experiments.planning.work import work
from gradstats.choice import unmeasured
from gradstats.forms.dense import Dense
from gradstats.forms.outer import Outer, OuterSum
from gradstats.joint import look
from gradstats.native import outer_sum

SQUARES = ("sum_of_squares",)
B = 5


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 10))


def positions() -> nn.Module:
    return nn.Sequential(nn.Linear(24, 32), nn.LayerNorm(32), nn.Linear(32, 10))


def convolution(channels: int, size: int) -> nn.Module:
    last = nn.Linear(2 * channels * size**2, 10)
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1), nn.Conv2d(channels, 2 * channels, 3, padding=1), nn.Flatten(), last
    )


Make = Callable[[], nn.Module]
CASES: dict[str, tuple[Make, Callable[[], Tensor]]] = {
    "without positions": (perceptron, lambda: torch.randn(B, 24)),
    "with positions": (positions, lambda: torch.randn(B, 7, 24)),
    "gpt": (lambda: GPT(50, 16, 2, 2, 8, tied=False), lambda: torch.randint(0, 50, (B, 8))),
    "gpt, tied": (lambda: GPT(50, 16, 2, 2, 8, tied=True), lambda: torch.randint(0, 50, (B, 8))),
    "convolutions, unfolded": (lambda: convolution(160, 2), lambda: torch.randn(B, 3, 2, 2)),
}


def traced(make: Make, x: Tensor, sums: tuple[str, ...]) -> tuple[int, list[Layer]]:
    """FLOPs of the plain step, and the prices."""
    shape, dtype = x.shape, x.dtype
    with FakeTensorMode():
        model = make()
        step = plain(model, lambda: model(torch.zeros(shape, dtype=dtype)).square().mean())
        return step.flops, price(step.calls, sums)


def counted(model: nn.Module, x: Tensor, more: dict[Any, Any] | None = None) -> int:
    with FlopCounterMode(display=False, custom_mapping=OF_CPU | (more or {})) as counter:
        model(x).square().mean().backward()
    model.zero_grad()
    return counter.get_total_flops()


@pytest.fixture(autouse=True)
def _matmuls(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch cannot count what the C++ kernel multiplies."""
    monkeypatch.setattr(outer_sum, "serves", lambda d, a: False)


ADDING = {"without positions", "gpt, tied", "convolutions, unfolded"}
# Without the kernel, norms of few positions are computed otherwise.
PAIRS = [*((name, "second_moment") for name in CASES), ("without positions", "norms")]


@pytest.mark.parametrize(("name", "statistic"), PAIRS)
def test_matmuls_are_those_of_an_attached_step(name: str, statistic: str) -> None:
    make, draw = CASES[name]
    x, model = draw(), make()
    stats = gradstats.attach(model, statistic)
    stats.probe(x)
    sums = tuple(raw.name for s in stats.statistics.values() for raw in s.needs)
    plainly, layers = traced(make, x, sums)
    extra = sum(one.matmuls for layer in layers for one in layer.works)
    assert plainly == counted(make(), x)
    with unmeasured():
        assert counted(model, x) == plainly + extra
    assert (extra > 0) == (statistic == "second_moment" and name in ADDING)


def test_squares_are_those_of_what_is_formed() -> None:
    """Of a Linear with many positions, where torch forms them an example at a time, and adds them up."""
    model, x = nn.Linear(600, 100), torch.randn(B, 40, 600)  # more than stays in cache
    stats = gradstats.attach(model)
    stats.probe(x)
    squared = {torch.ops.aten.addcmul_: lambda sums, *_, **__: 2 * prod(sums)}
    plainly, (layer,) = traced(lambda: nn.Linear(600, 100), x, SQUARES)
    weight, bias = layer.works
    with unmeasured():
        assert counted(model, x, squared) - plainly == weight.squares == 2 * B * 600 * 100
    assert bias.squares == 2 * B * 100


def test_squares_of_factors_are_in_memory_where_no_kernel_squares_them() -> None:
    form = Outer(torch.zeros(B, 7), torch.zeros(B, 9))
    assert work(form, SQUARES).temporary == 0
    assert work(form, SQUARES, on_gpu=True).temporary == form.d.square().nbytes + form.a.square().nbytes


def test_a_head_waits_with_its_values_where_the_embedding_is_looked_up() -> None:
    make, draw = CASES["gpt, tied"]
    x = draw()
    _, layers = traced(make, x, SQUARES)
    head = OuterSum(torch.randn(B, 8, 50), torch.randn(B, 8, 16))
    _, looked = look(head, x, SQUARES)
    assert {layer.call.name: layer.waiting for layer in layers if layer.waiting} == {"head": looked.h.nbytes}


def test_plain_flops_of_layers_leave_attention() -> None:
    make, draw = CASES["gpt"]
    flops, layers = traced(make, draw(), SQUARES)
    attention = 2 * 7 * 2 * B * 2 * 8 * 8 * 8  # layers, matmuls, FLOPs, examples, heads, t, t, width of a head
    assert flops - sum(layer.plain for layer in layers) == attention


@pytest.mark.parametrize("name", ["without positions", "convolutions, unfolded"])
def test_plain_flops_of_layers_are_all(name: str) -> None:
    make, draw = CASES[name]
    flops, layers = traced(make, draw(), SQUARES)
    assert flops == sum(layer.plain for layer in layers)


def test_what_has_no_formula() -> None:
    with pytest.raises(UserError, match="no formula says what sign_mean costs"):
        work(Dense(torch.zeros(2, 3)), ["sign_mean"])
    with pytest.raises(UserError, match=r"^0.rnn \(LSTM\): no formula"):
        traced(lambda: nn.Sequential(Recurrent()), torch.zeros(2, 3, 4), SQUARES)
    with pytest.raises(UserError, match="first, second share a parameter"):
        traced(Shared, torch.zeros(2, 4), SQUARES)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x)))
