"""The two ways to run an Update, and what becomes of shapes on the way."""

import warnings
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from gradstats.native import adam as native_adam
from gradstats.optim import BatchInvariantAdam, BatchInvariantSGD, elementwise
from gradstats.optim.adam import AdamUpdate
from gradstats.optim.moment import Moment
from gradstats.optim.update import Update

D = torch.float64


@dataclass(frozen=True)
class Toy(Update):
    """a <- a + w m;  p <- p - a."""

    buffers = ("a",)

    @property
    def bounded(self):
        return "a"

    def averages(self, x, k):
        return {"a": x.a + k.w * x.m}

    def change(self, x, k):
        return x.a.clone()


SCALARS = {"mean_scale": 2.0, "w": 0.5, "decay": 0.25}


def columns(*shapes, change=lambda t: t):
    torch.manual_seed(0)
    return {name: [change(torch.randn(shape, dtype=D)) for shape in shapes] for name in ("parameter", "gradient", "a")}


def expected(found):
    a = [a + g for a, g in zip(found["a"], found["gradient"], strict=True)]
    return a, [0.25 * p - x for p, x in zip(found["parameter"], a, strict=True)]


def check(found, compiled=False, phases=("both",), scalars=SCALARS):
    a, p = expected(found)
    for phase in phases:
        elementwise.run(Toy(), phase, found, scalars, compiled)
    for name, values in (("a", a), ("parameter", p)):
        for t, value in zip(found[name], values, strict=True):
            torch.testing.assert_close(t, value, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("compiled", [False, True])
def test_any_shape_small_large_and_empty(compiled, monkeypatch):
    monkeypatch.setattr(elementwise, "BLOCK", 64)
    monkeypatch.setattr(elementwise, "SMALL", 16)
    monkeypatch.setattr(elementwise, "LARGEST", 64)
    check(columns((3,), (), (0, 2), (200,), (5, 30), (4, 4), (64,), (65,), (1, 63)), compiled)


def test_a_compiled_kernel_takes_several_rows_at_once(monkeypatch):
    """As often as there are as many; the others one by one, and large ones piece by piece."""
    monkeypatch.setattr(elementwise, "LARGEST", 5)
    calls = []

    def kernel(*tensors):
        calls.append(tensors[:-1])

    k = torch.ones(1)
    rows = [(torch.full((n,), float(n)), torch.full((n,), -float(n))) for n in (1, 2, 3, 12, 4)]
    elementwise.run_compiled({1: kernel, 3: kernel}, iter(rows), k)
    assert [[len(t) for t in call] for call in calls] == [[1, 1, 2, 2, 3, 3], [5, 5, 5, 5, 2, 2], [4, 4]]
    assert all((call[i] == -call[i + 1]).all() for call in calls for i in range(0, len(call), 2))


def test_kernels_of_several_rows_are_for_many_parameters():
    def kernels(n):
        return elementwise.compiled_kernels(Toy(), "both", columns(*[(2,)] * n), SCALARS)

    assert set(kernels(elementwise.ROWS - 1)) == {1} and set(kernels(elementwise.ROWS)) == {1, elementwise.ROWS}


def test_joins_are_bounded(monkeypatch):
    """Small tensors are put together until they fill a block, not all at once."""
    monkeypatch.setattr(elementwise, "SMALL", 10)
    sizes = []
    original = torch.cat

    def cat(tensors):
        sizes.append(sum(t.numel() for t in tensors))
        return original(tensors)

    monkeypatch.setattr(torch, "cat", cat)
    check(columns(*[(4,)] * 20))
    assert len(sizes) == 3 * 7 and max(sizes) == 12  # three tensors of each parameter


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.mT.contiguous().mT,  # dense, in another order
        lambda t: torch.stack([t, t], -1)[..., 0],  # with gaps
        lambda t: t.to(memory_format=torch.channels_last),
    ],
)
def test_layouts(change, compiled):
    check(columns((2, 3, 4, 5), (2, 2, 1, 3), change=change), compiled)


def test_gradients_of_another_layout():
    found = columns((4, 6), (4, 6))
    found["gradient"] = [g.mT.contiguous().mT for g in found["gradient"]]
    check(found)
    found = columns((4, 6), (4, 6), change=lambda t: t.mT.contiguous().mT)
    found["gradient"] = [g.contiguous() for g in found["gradient"]]
    check(found)
    found = columns((4, 6))
    found["a"] = [a.mT.contiguous().mT for a in found["a"]]  # a buffer that is written
    check(found)


@pytest.mark.parametrize("compiled", [False, True])
def test_phases_and_clipping(compiled):
    check(columns((7, 3), (5,)), compiled, ("averages", "move"), SCALARS | {"clip": 1.0})
    found = columns((7, 3))
    a = found["a"][0] + found["gradient"][0]
    p = found["parameter"][0] * 0.25 - 0.5 * a
    for phase in ("averages", "move"):
        elementwise.run(Toy(), phase, found, SCALARS | {"clip": torch.tensor(0.5)}, compiled)
    torch.testing.assert_close(found["parameter"][0], p)
    torch.testing.assert_close(found["a"][0], a)  # the average itself is not clipped


@pytest.mark.parametrize("phases", [("both",), ("averages", "move")])
@pytest.mark.parametrize("way", ["plain", "compiled", "native"])
def test_autograd_is_told_of_what_was_written(way, phases):
    """So that a graph from before the step, which saved the parameters, is refused."""
    update = AdamUpdate(Moment(False))
    found = {name: [torch.rand(5)] for name in ("parameter", "gradient", *update.buffers)}
    scalars = dict.fromkeys(native_adam.SCALARS, 0.5)
    before = {name: t._version for name, (t,) in found.items()}
    for phase in phases:
        elementwise.run(update, phase, found, scalars, compiled=way == "compiled", ready=way == "native")
    assert {name for name, (t,) in found.items() if t._version > before[name]} == {"parameter", *update.buffers}


def test_without_a_compiler_it_says_so_and_goes_on(monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("no C++ compiler here")

    monkeypatch.setattr("torch._inductor.standalone_compile", fails)
    elementwise.compile_update.cache_clear()
    try:
        with pytest.warns(UserWarning, match="no C\\+\\+ compiler here.*compiled=False"):
            check(columns((5,)), compiled=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            check(columns((5,)), compiled=True)  # once is enough
    finally:
        elementwise.compile_update.cache_clear()


def test_path_is_said(monkeypatch):
    small, large = nn.Linear(2, 2), nn.Linear(1024, 1024)
    assert BatchInvariantAdam(small.parameters()).path.startswith("native kernel (")
    assert "compiled=False" in BatchInvariantAdam(large.parameters(), compiled=False).path
    path = BatchInvariantSGD(small.parameters()).path
    assert path == "plain torch, block by block (6 elements are too few to compile this equation for)"
    assert BatchInvariantSGD(small.parameters(), compiled=True).path.startswith("compiled (")
    assert BatchInvariantSGD(large.parameters()).path.startswith("compiled (")
    monkeypatch.setattr("gradstats.optim.base.compiler", lambda device: None)
    assert "no compiler was found" in BatchInvariantSGD(large.parameters()).path
