"""What the host of an accelerator would have to wait for, counted on the CPU."""

from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from experiments.gpt import GPT
from gradstats import attach, native
from gradstats.compute import call
from gradstats.optim import BatchInvariantAdam
from tests.layers import LAYERS, Row

GPTS = {
    f"gpt, {name}": Row(lambda tied=tied: GPT(50, 16, 2, 2, 8, tied=tied), lambda: torch.randint(0, 50, (5, 8)))
    for name, tied in (("tied", True), ("untied", False))
}


class Waits(TorchDispatchMode):
    """Counts operations whose result, or its size, the host must wait for on an accelerator. Those that are asked for
    as numbers, bool(x) and float(x) too, are _local_scalar_dense. `host` are addresses of what is there anyhow."""

    WAITING = frozenset(
        {"_local_scalar_dense", "equal", "allclose", "is_nonzero", "nonzero", "masked_select"}
        | {"unique_dim", "unique_consecutive", "_unique2"}
    )

    def __init__(self, host):
        super().__init__()
        self.counted, self.host = Counter(), host

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        by_mask = name in ("index", "index_put_") and any(i is not None and i.dtype == torch.bool for i in args[1])
        if (name in self.WAITING and args[0].data_ptr() not in self.host) or by_mask:
            self.counted[name] += 1
        return func(*args, **(kwargs or {}))


class Copies(TorchFunctionMode):
    """Counts methods that copy to the host: of a tensor that is there, no operation shows it. Not .to(device) of a
    torch.device, nor copy_: here all devices are the CPU."""

    COPYING = frozenset({"cpu", "numpy", "tolist", "__array__"})

    def __init__(self):
        super().__init__()
        self.counted = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in self.COPYING or (name == "to" and "cpu" in [a for a in args[1:] if isinstance(a, str)]):
            self.counted[name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counted(host=frozenset()):
    total = Counter()
    with Waits(host) as waits, Copies() as copies:
        yield total
    total.update(waits.counted + copies.counted)


def backward(model, x):
    output = call(model, x)
    (output[0] if isinstance(output, tuple) else output).square().mean().backward()


def step(model, x):
    with counted() as total:
        backward(model, x)
    model.zero_grad()
    return total


ASKED = {
    "a number": lambda x: x.sum().item(),
    "a truth": lambda x: bool(x.any()),
    "a list": lambda x: x.tolist(),
    "a copy": lambda x: x.cpu(),
    "a copy by its device": lambda x: x.to("cpu"),
    "an array": lambda x: x.numpy(),
    "equality": lambda x: torch.equal(x, x + 1),
    "closeness": lambda x: torch.allclose(x, x + 1),
    "places": lambda x: x.nonzero(),
    "a mask": lambda x: x[x > 0],
}


@pytest.mark.parametrize("name", ASKED)
def test_waits_are_seen(name):
    with counted() as total:
        ASKED[name](torch.ones(3))
    assert total.total() == 1


# torch's own EmbeddingBag takes offsets from the device; ours pads the bags, which needs their sizes.
PADDED = {name for name in LAYERS if "offsets" in name}


@pytest.mark.parametrize("statistic", ["second_moment", "norms", "variance"])
@pytest.mark.parametrize("name", sorted((LAYERS | GPTS).keys() - PADDED))
def test_a_step(name, statistic):
    row = (LAYERS | GPTS)[name]
    model, x = row.make(), row.x()
    plain = step(model, x)
    stats = attach(model, statistic)
    for _ in range(2):  # both probe
        step(model, x)
    assert stats.batch_size and step(model, x) == plain


# Reading them asks whether p.grad is the one they go with, by sixteen of its numbers: one look for every entry.
BESIDE_THE_GRADIENT = {"variance", "snr", "noise_scale"}
READ = BESIDE_THE_GRADIENT | {"second_moment", "norms", "sign_mean", "abs_mean", "max_abs", "gram", "cosine_similarity"}


@pytest.mark.parametrize("name", sorted(READ))
def test_reading(name):
    model, x = GPTS["gpt, untied"].make(), GPTS["gpt, untied"].x()
    stats = attach(model, name)
    backward(model, x)
    with counted() as total:
        entries = list(stats.read(name).values())
    assert len(entries) == len(list(model.parameters()))
    assert total == ({"allclose": len(entries)} if name in BESIDE_THE_GRADIENT else {})


@pytest.mark.parametrize("name", ["norms", "gram", "cosine_similarity"])
def test_reading_of_a_total(name):
    model, x = GPTS["gpt, untied"].make(), GPTS["gpt, untied"].x()
    stats = attach(model, name)
    backward(model, x)
    with counted() as total:
        assert len(stats.read(name).total) == len(x)
    assert not total


@pytest.mark.parametrize("options", [{}, {"reference_batch_size": 1}, {"max_norm": 1.0}], ids=str)
def test_an_optimizers_step(options, monkeypatch):
    monkeypatch.setattr(native, "enabled", False)  # the kernel for the CPU takes the bound as a number
    model, x = GPTS["gpt, untied"].make(), GPTS["gpt, untied"].x()
    attach(model)
    optimizer = BatchInvariantAdam(model.parameters(), batch_size=16, **options)
    counts = frozenset()
    for first in (True, False, False):
        optimizer.zero_grad()
        backward(model, x)
        with counted(counts) as total:
            optimizer.step()
        assert first or not total
        # As torch's Adam keeps them: on the host.
        counts = {v.data_ptr() for state in optimizer.state.values() for v in state.values() if v.dim() == 0}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA: torch's own word on what waits is asked there")
def test_steps_on_cuda():
    model = GPTS["gpt, untied"].make().cuda()
    x = GPTS["gpt, untied"].x().cuda()
    stats = attach(model, "second_moment", "norms")
    optimizer = BatchInvariantAdam(model.parameters(), batch_size=16)
    for mode in ("default", "default", "error"):  # the first two probe, compile and choose
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(mode)
        try:
            backward(model, x)
            assert len(list(stats.norms.values())) == len(list(model.parameters()))
            optimizer.step()
            optimizer.zero_grad()
        finally:
            torch.cuda.set_sync_debug_mode("default")
