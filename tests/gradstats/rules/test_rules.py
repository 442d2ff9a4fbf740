"""Every layer of the table against the oracle."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

import gradstats
from gradstats import per_example_gradients
from tests import oracle
from tests.layers import LAYERS, B

# Torch's advice on functions that it maps one example at a time.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")


def floats(value) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def run(row, dtype, engine):
    model = row.make().to(dtype)
    x = tree_map(lambda v: v.to(dtype) if floats(v) else v, row.x())
    weights = torch.rand(B, dtype=dtype) + 0.5
    expected = oracle.contributions(model, oracle.coupled_loss, x, weights)
    plain = copy.deepcopy(model)
    plain_x, attached_x = (tree_map(lambda v: v.clone().requires_grad_() if floats(v) else v, x) for _ in range(2))
    oracle.coupled_loss(oracle.call(plain, plain_x), weights).backward()
    handle = gradstats.attach(model, *oracle.STATISTICS, engine=engine)
    oracle.coupled_loss(oracle.call(model, attached_x), weights).backward()
    return model, plain, plain_x, attached_x, handle, expected


# torch.func does not run through activation checkpointing; that it is refused is tested in test_fallback.
VMAPPED = [name for name in LAYERS if "checkpointed" not in name]
ENGINES = pytest.mark.parametrize(("name", "engine"), [(n, "fused") for n in LAYERS] + [(n, "vmap") for n in VMAPPED])


@ENGINES
def test_statistics_match_the_oracle_in_float64(name, engine):
    model, plain, plain_x, attached_x, handle, expected = run(LAYERS[name], torch.float64, engine)
    assert oracle.exact(handle, expected)
    assert handle.batch_size == B
    for p, reference in zip(model.parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == (reference.grad is None)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, reference.grad, rtol=1e-10, atol=1e-12)
    for found, reference in zip(tree_leaves(attached_x), tree_leaves(plain_x), strict=True):
        if floats(reference):
            torch.testing.assert_close(found.grad, reference.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", LAYERS)
def test_statistics_match_the_oracle_in_float32(name):
    _, _, _, _, handle, expected = run(LAYERS[name], torch.float32, "fused")
    assert oracle.worst(oracle.errors(handle, expected)) <= 1e-5


LOW = ["linear", "transformers Conv1D", "conv2d", "transposed conv2d", "prelu, channels", "embedding bag, mean"]


@pytest.mark.parametrize("name", LOW)
def test_autocast_is_that_of_the_plain_layer(name):
    row = LAYERS[name]
    model, x, weights = row.make(), row.x(), torch.rand(B)
    expected = oracle.contributions(model, oracle.coupled_loss, x, weights)
    plain = copy.deepcopy(model)
    handle = gradstats.attach(model, *oracle.STATISTICS)
    with torch.autocast("cpu", torch.bfloat16):
        y, reference = model(x), plain(x)
    torch.testing.assert_close(y, reference, rtol=0, atol=0)
    for output in (y, reference):
        oracle.coupled_loss(output.float(), weights).backward()
    # One rounding to bfloat16 is 0.4%.
    assert oracle.worst(oracle.errors(handle, expected)) <= 0.05
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", VMAPPED)
def test_per_example_gradients_match_the_oracle(name):
    row = LAYERS[name]
    model = row.make().double()
    x = oracle.to_double(row.x())
    weights = torch.rand(B, dtype=torch.float64)
    expected = oracle.contributions(model, oracle.coupled_loss, x, weights)
    for chunk_size in (None, 2):
        found = per_example_gradients(model, oracle.coupled_loss, x, weights, chunk_size=chunk_size)
        whole = oracle.whole({k: v * B for k, v in expected.items()})
        assert found.keys() == expected.keys()
        assert max(oracle.error(found[k], expected[k] * B, whole) for k in expected) <= 1e-10


class Changed(nn.Module):
    """What the layer returns, changed in place."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *args, **kwargs):
        y = self.layer(*args, **kwargs)
        return y.mul_(2).add_(1)


@ENGINES
def test_outputs_may_be_changed_in_place(name, engine):
    """Of layers whose gradients do not need their outputs, as torch itself has it."""
    row = LAYERS[name]
    model = Changed(row.make().double())
    x = oracle.to_double(row.x())
    weights = torch.rand(B, dtype=torch.float64) + 0.5
    expected = oracle.contributions(model, oracle.coupled_loss, x, weights)
    handle = gradstats.attach(model, *oracle.STATISTICS, engine=engine, every=2)
    oracle.coupled_loss(oracle.call(model, x), weights).backward()
    assert oracle.exact(handle, expected)
    model.zero_grad()
    oracle.coupled_loss(oracle.call(model, x), weights).backward()
    assert handle.batch_size == B and not handle.gathered
