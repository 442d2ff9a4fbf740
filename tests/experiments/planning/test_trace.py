"""A traced step beside a real one, whose allocations torch's profiler records."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from experiments.benchmarks.meter import Profiled
from experiments.benchmarks.networks import perceptron, resnet18
from experiments.gpt import GPT
from experiments.planning.layers import price
from experiments.planning.trace import peak, plain, shard

Make = Callable[[], nn.Module]
MODELS: dict[str, tuple[Make, tuple[int, ...]]] = {
    "mlp": (lambda: perceptron(64, 256, 256, 10), (256, 64)),
    "resnet": (lambda: resnet18(16, 10), (8, 3, 32, 32)),
    "gpt": (lambda: GPT(200, 64, 2, 4, 32, tied=True), (8, 32)),
    "gpt, checkpointed": (lambda: GPT(200, 64, 2, 4, 32, tied=True, checkpointed=True), (8, 32)),
}


def batch(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    x = torch.zeros(shape, dtype=torch.long) if len(shape) == 2 and shape[1] == 32 else torch.zeros(shape)
    return x, torch.zeros(shape if not x.is_floating_point() else shape[:1], dtype=torch.long)


def loss_of(model: nn.Module, shape: tuple[int, ...]) -> Callable[[], Tensor]:
    def loss() -> Tensor:
        x, y = batch(shape)
        return F.cross_entropy(model(x).flatten(0, -2), y.flatten())

    return loss


@pytest.mark.parametrize("name", MODELS)
def test_peak_of_a_plain_step(name: str) -> None:
    make, shape = MODELS[name]
    gc.collect()  # what another test has left would be freed in the middle of the measurement
    model = make()
    loss = loss_of(model, shape)
    loss().backward()
    model.zero_grad()
    meter = Profiled()
    with meter.contestant(), meter.steps():
        loss().backward()
    with FakeTensorMode():
        model = make()
        step = plain(model, loss_of(model, shape))
    assert step.peak == pytest.approx(meter.peak, rel=0.03)  # GroupNorm has temporaries of its own
    assert 0 < step.kept < step.peak


def test_statistics_are_there_from_their_layers_backward_pass_on() -> None:
    width, layers = 512, 6
    P = 4 * width**2
    with FakeTensorMode():
        model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
        loss = loss_of(model, (1, width))
        step = plain(model, loss)
        priced = price(step.calls, ["sum_of_squares"])
        alone, gathered, cut = (
            peak(model, loss, *given)
            for given in (
                (priced, lambda p: []),
                (priced, lambda p: [torch.empty(p.shape)]),
                (priced, lambda p: [torch.empty(p.shape)], layers),
            )
        )
    slack = 40 * 4 * width
    assert gathered == alone + layers * P
    assert alone == pytest.approx(step.peak, abs=slack) == pytest.approx(layers * P, abs=slack)
    # Of both, a rank has its parts, and one layer's whole.
    assert cut == pytest.approx(2 * P + 2 * (layers - 1) * shard(torch.empty(width, width), layers).nbytes, abs=slack)
    assert all(p.grad is None for p in model.parameters())


def test_parts_are_cut_along_the_first_dimension() -> None:
    assert [len(shard(torch.zeros(rows, 3), 4)) for rows in (8, 9, 2)] == [2, 3, 1]
    assert shard(torch.zeros(()), 4).shape == ()
