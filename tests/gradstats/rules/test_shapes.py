"""Shapes and options drawn by hypothesis, fused against the oracle."""

from typing import Any

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._pytree import tree_map

import gradstats
from tests import oracle

# Hundreds of shapes would say no more than dozens, and each needs one backward pass per example.
drawn = settings(max_examples=40, deadline=None)


# Not for normalisation, which magnifies the rounding of float32 where all numbers it sees are alike.
dtypes = st.sampled_from([torch.float64, torch.float32])


def check(model: nn.Module, x: torch.Tensor | dict[str, Any], dtype: torch.dtype = torch.float64) -> None:
    model = model.to(dtype)
    x = tree_map(lambda t: t.to(dtype) if t.is_floating_point() else t, x)
    examples = len(next(iter(x.values())) if isinstance(x, dict) else x)
    weights = torch.rand(examples, dtype=dtype) + 0.5
    expected = oracle.contributions(model, oracle.coupled_loss, x, weights)
    with gradstats.attach(model, *oracle.STATISTICS) as handle:
        oracle.coupled_loss(oracle.call(model, x), weights).backward()
        limit = 1e-10 if dtype == torch.float64 else 1e-4
        assert oracle.worst(oracle.errors(handle, expected)) <= limit


@given(st.data())
@drawn
def test_linear(data):
    size = st.integers(1, 5)
    leading = data.draw(st.lists(size, max_size=3))
    inputs, outputs = data.draw(size), data.draw(size)
    x = torch.randn(data.draw(st.integers(2, 6)), *leading, inputs, dtype=torch.float64)
    check(nn.Linear(inputs, outputs, bias=data.draw(st.booleans())), x, data.draw(dtypes))


@given(st.data())
@drawn
def test_convolution(data):
    small = st.integers(1, 3)
    dimensions = data.draw(small)
    per_dimension = st.tuples(*[small] * dimensions)
    kernel, dilation = data.draw(per_dimension), data.draw(per_dimension)
    mode = data.draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    if data.draw(st.booleans()):
        padding, stride = "same", 1
        # torch warns about an uneven "same", which the table of layers covers.
        assume(mode != "zeros" or all(d * (k - 1) % 2 == 0 for d, k in zip(dilation, kernel, strict=True)))
        reach = max(d * (k - 1) for d, k in zip(dilation, kernel, strict=True))
    else:
        padding, stride = data.draw(st.tuples(*[st.integers(0, 2)] * dimensions)), data.draw(per_dimension)
        reach = max(padding)
    groups = data.draw(small)
    inputs, outputs = groups * data.draw(st.integers(1, 2)), groups * data.draw(st.integers(1, 2))
    # Reflection and circular padding need more pixels than they add.
    extent = [d * (k - 1) + 1 + reach + data.draw(small) for d, k in zip(dilation, kernel, strict=True)]
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1](
        inputs, outputs, kernel, stride, padding, dilation, groups, bias=data.draw(st.booleans()), padding_mode=mode
    )
    check(layer, torch.randn(3, inputs, *extent, dtype=torch.float64), data.draw(dtypes))


@given(st.data())
@drawn
def test_transposed_convolution(data):
    small = st.integers(1, 3)
    dimensions = data.draw(small)
    per_dimension = st.tuples(*[small] * dimensions)
    kernel, dilation, stride, extent = (data.draw(per_dimension) for _ in range(4))
    # Torch wants less output padding than one step of the stride or of the dilation, and some output.
    beyond = tuple(data.draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
    geometry = zip(extent, stride, dilation, kernel, beyond, strict=True)
    whole = [(e - 1) * s + d * (k - 1) + b + 1 for e, s, d, k, b in geometry]
    padding = tuple(data.draw(st.integers(0, (size - 1) // 2)) for size in whole)
    groups = data.draw(small)
    inputs, outputs = groups * data.draw(st.integers(1, 2)), groups * data.draw(st.integers(1, 2))
    layer = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dimensions - 1](
        inputs, outputs, kernel, stride, padding, beyond, groups, data.draw(st.booleans()), dilation
    )
    check(layer, torch.randn(3, inputs, *extent, dtype=torch.float64), data.draw(dtypes))


@given(st.data())
@drawn
def test_normalisation(data):
    size = st.integers(2, 4)
    n, groups, per_group = data.draw(size), data.draw(size), data.draw(size)
    positions = data.draw(st.lists(size, min_size=1, max_size=2))
    x = torch.randn(n, *positions, groups * per_group, dtype=torch.float64)
    kept = data.draw(st.integers(1, len(positions) + 1))
    shape = x.shape[-kept:]
    check(nn.LayerNorm(shape, bias=data.draw(st.booleans())), x)
    check(nn.RMSNorm(shape), x)
    # Contiguous: on any other layout torch's own GroupNorm, the oracle, can crash in its backward.
    check(nn.GroupNorm(groups, groups * per_group), x.movedim(-1, 1).contiguous())


@given(st.data())
@drawn
def test_embedding(data):
    size = st.integers(1, 6)
    rows = data.draw(size)
    ids = torch.randint(0, rows, (data.draw(st.integers(2, 5)), *data.draw(st.lists(size, max_size=2))))
    padding = data.draw(st.none() | st.integers(-rows, rows - 1))
    frequency = data.draw(st.booleans())
    check(
        nn.Embedding(rows, data.draw(size), padding_idx=padding, scale_grad_by_freq=frequency), ids, data.draw(dtypes)
    )


@given(st.data())
@drawn
def test_embedding_bag(data):
    size = st.integers(1, 6)
    rows, bags, longest = data.draw(size), data.draw(st.integers(2, 5)), data.draw(size)
    padding = data.draw(st.none() | st.integers(-rows, rows - 1))
    mode = data.draw(st.sampled_from(["sum", "mean", "max"]))
    x = {"input": torch.randint(0, rows, (bags, longest))}
    if mode == "sum" and data.draw(st.booleans()):
        x["per_sample_weights"] = torch.randn(bags, longest, dtype=torch.float64)
    check(nn.EmbeddingBag(rows, data.draw(size), mode=mode, padding_idx=padding), x)


@given(st.data())
@drawn
def test_bilinear(data):
    size = st.integers(1, 4)
    leading = [data.draw(st.integers(2, 5)), *data.draw(st.lists(size, max_size=2))]
    first, second = data.draw(size), data.draw(size)
    x = {f"input{i + 1}": torch.randn(*leading, width, dtype=torch.float64) for i, width in enumerate((first, second))}
    check(nn.Bilinear(first, second, data.draw(size), bias=data.draw(st.booleans())), x, data.draw(dtypes))
