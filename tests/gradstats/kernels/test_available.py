"""When kernels serve, and that what they serve computes the same with and without them."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradstats
from gradstats import kernels
from gradstats.kernels import adam, linear, normalization, rows
from gradstats.optim import BatchInvariantAdam, elementwise
from tests.gradstats.kernels.conftest import DEVICE


class OnDevice:
    """What `available` asks of a tensor, as one on a GPU answers."""

    is_cuda = True

    def __init__(self, dtype=torch.float32, size=3, device="cuda:0", addressable=True):
        self.dtype, self.device, self.size = dtype, torch.device(device), size
        self.addressable = addressable

    def numel(self):
        return self.size


@pytest.mark.parametrize(
    ("tensors", "served"),
    [
        ((OnDevice(), OnDevice()), True),
        ((OnDevice(torch.bfloat16),), True),
        ((OnDevice(torch.float64),), False),
        ((OnDevice(), OnDevice(torch.float16)), False),
        ((OnDevice(), OnDevice(size=0)), False),
        ((OnDevice(), OnDevice(addressable=False)), False),  # a DTensor, or lazily negated
        ((OnDevice(), OnDevice(device="cuda:1")), False),
        ((torch.ones(3),), False),
    ],
)
def test_tensors(tensors, served, monkeypatch):
    monkeypatch.setattr(kernels, "compiles", lambda device: True)
    monkeypatch.setattr(kernels, "addressable", lambda *tensors: all(t.addressable for t in tensors))
    assert kernels.available(*tensors) == served
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not kernels.available(*tensors)


@pytest.mark.parametrize(
    ("found", "capability", "served"), [(True, (8, 0), True), (True, (7, 5), False), (None, (9, 0), False)]
)
def test_devices(found, capability, served, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: found)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert kernels.compiles.__wrapped__(torch.device("cuda")) == served


class Words(nn.Module):
    """Every layer that has a kernel, and a head tied to the embedding."""

    def __init__(self):
        super().__init__()
        self.embedding, self.layer, self.rms = nn.Embedding(11, 8), nn.LayerNorm(8), nn.RMSNorm(8, eps=1e-6)
        self.wide, self.narrow, self.head = nn.Linear(8, 20), nn.Linear(20, 8), nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.positions = nn.Embedding(6, 8)

    def forward(self, ids):
        h = self.embedding(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device).expand_as(ids))
        return self.head(self.rms(h + self.narrow(self.wide(self.layer(h)).relu())))


def steps(granularity="example"):
    """Statistics of the first and parameters after the second step of training."""
    torch.manual_seed(0)
    model = Words().to(DEVICE)
    stats = gradstats.attach(model, "second_moment", "norms", granularity=granularity)
    optimizer = BatchInvariantAdam(model.parameters(), lr=0.01, batch_size=4, compiled=False)
    found = {}
    for step in range(2):
        ids = torch.randint(0, 11, (4, 6), device=DEVICE)
        F.cross_entropy(model(ids).flatten(0, 1), ids.roll(1, 1).flatten()).backward()
        if step == 0:
            for name, p in model.named_parameters():
                found[name, "q"], found[name, "norms"] = stats.second_moment[name], stats.norms[name]
                found[name, "gradient"] = p.grad.clone()
        optimizer.step()
        optimizer.zero_grad()
    return found | {name: p.detach() for name, p in model.named_parameters()}


@pytest.fixture
def launched(monkeypatch):
    """Kernels that ran, on tensors of float32."""
    names = []
    for module, name in ((linear, "sums"), (normalization, "backward"), (rows, "sums")):
        original = getattr(module, name)

        def counted(*args, original=original, module=module):
            names.append(module.__name__.rpartition(".")[2])
            return original(*args)

        monkeypatch.setattr(module, name, counted)
    served = lambda *tensors: all(t.dtype == torch.float32 and t.numel() for t in tensors)  # noqa: E731
    monkeypatch.setattr(kernels, "available", served)
    monkeypatch.setattr(elementwise, "available", served)
    monkeypatch.setattr("gradstats.native.outer_sum.serves", lambda d, a: False)  # as on a device
    torch.use_deterministic_algorithms(True)  # the first of several ways is taken, which is the kernel
    return names


def test_a_model_is_the_same_with_kernels(launched, monkeypatch):
    with_kernels = steps()
    # Of two steps: two layers with positions and the head, two normalisations, two embeddings; the tied one's rows are
    # mended into the head's sums.
    assert {name: launched.count(name) for name in launched} == {"linear": 6, "normalization": 4, "rows": 2}
    monkeypatch.undo()
    for key, expected in steps().items():
        torch.testing.assert_close(with_kernels[key], expected, rtol=1e-4, atol=1e-6)


def test_positions_of_normalisations(launched, monkeypatch):
    """Kernels sum positions; where every one counts by itself, they are formed anew."""

    def second_moments():
        torch.manual_seed(0)
        model = nn.Sequential(nn.LayerNorm(5), nn.RMSNorm(5, eps=1e-6)).to(DEVICE)
        stats = gradstats.attach(model, granularity="token")
        model(torch.randn(3, 4, 5, device=DEVICE)).sin().sum().backward()
        return {name: stats.second_moment[name] for name, _ in model.named_parameters()}

    with_kernels = second_moments()
    assert launched == ["normalization"] * 2
    monkeypatch.undo()
    for name, expected in second_moments().items():
        torch.testing.assert_close(with_kernels[name], expected)


@pytest.mark.parametrize("reference", [1, 2, 4])  # 4: the batch size itself, where no statistic is read
def test_optimizer(reference, launched, monkeypatch):
    """A compiled step on a device goes to the kernel where that has its equation."""
    moved = []
    original = adam.step
    monkeypatch.setattr(adam, "step", lambda *args: moved.append(1) or original(*args))

    def trained(**options):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)).to(DEVICE)
        gradstats.attach(model)
        optimizer = BatchInvariantAdam(model.parameters(), lr=0.1, batch_size=4, weight_decay=0.1, **options)
        for _ in range(3):
            model(torch.randn(4, 5, device=DEVICE)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return list(model.parameters())

    by_kernel = trained(compiled=True, reference_batch_size=reference)
    assert len(moved) == 3
    monkeypatch.setattr(elementwise, "available", lambda *tensors: False)
    for p, expected in zip(by_kernel, trained(compiled=False, reference_batch_size=reference), strict=True):
        torch.testing.assert_close(p, expected, rtol=1e-5, atol=1e-6)
    assert len(moved) == 3


def test_library_runs_without_triton():
    program = """
import sys
sys.modules["triton"] = None
import torch, gradstats
model = torch.nn.Sequential(torch.nn.LayerNorm(2), torch.nn.Linear(2, 2))
gradstats.attach(model)
model(torch.ones(3, 4, 2)).sum().backward()
"""
    subprocess.run([sys.executable, "-c", program], check=True)
