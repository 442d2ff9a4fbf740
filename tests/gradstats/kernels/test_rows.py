"""The kernels of embedding rows against contributions in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradstats.kernels import rows as kernel
from tests.gradstats.kernels.conftest import DEVICE

BOTH = ("sum_of_squares", "squared_norms")
# Of the gradient to the layer's dtype: the interpreter truncates bfloat16. Sums are float32 whatever that is.
ROUNDING = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 8e-3}


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape, device=DEVICE).to(dtype)


def error(found, expected):
    assert found.shape == expected.shape
    return float((found.double() - expected).norm() / expected.norm().clamp(min=1e-300))


def check(ids, d, rows, names=BOTH):
    one_hot = torch.nn.functional.one_hot(ids.long(), rows).double()
    c = torch.einsum("ntr,nto->nro", one_hot, d.double())
    gradient, found = kernel.sums(ids, d, rows, names)
    assert gradient.dtype == d.dtype and set(found) == set(names)
    assert error(gradient, c.sum(0)) <= ROUNDING[d.dtype]
    if "sum_of_squares" in names:
        assert error(found["sum_of_squares"], c.square().sum(0)) <= 1e-6
    if "squared_norms" in names:
        assert error(found["squared_norms"], c.square().sum((1, 2))) <= 1e-6


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 5),
    st.integers(1, 12),
    st.integers(1, 40),
    st.integers(1, 9),
    st.sampled_from(sorted(ROUNDING, key=str)),
)
def test_any_shape(n, t, o, rows, dtype):
    torch.manual_seed(0)
    check(torch.randint(0, rows, (n, t), device=DEVICE), randn(n, t, o, dtype=dtype), rows)


@pytest.mark.parametrize("names", [(), ("sum_of_squares",), ("squared_norms",)])
def test_what_is_not_asked_for_is_not_returned(names):
    check(torch.randint(0, 4, (3, 5), device=DEVICE), randn(3, 5, 6), 4, names)


def test_runs_longer_than_a_block(monkeypatch):
    """One row looked up by every position of every example, and one feature more than a block has."""
    monkeypatch.setattr(kernel, "POSITIONS", 4)
    monkeypatch.setattr(kernel, "FEATURES", 8)
    check(torch.zeros(6, 9, dtype=torch.long, device=DEVICE), randn(6, 9, 17), 1)
    check(torch.tensor([[3, 1, 3, 3, 0, 3, 3], [1, 1, 1, 1, 1, 1, 3]], device=DEVICE), randn(2, 7, 17), 5)


def test_narrow_ids_and_strides():
    ids = torch.randint(0, 7, (5, 4), device=DEVICE, dtype=torch.int32).T
    check(ids, randn(6, 4, 10).permute(1, 2, 0)[:, ::2], 7)
    check(ids[:, :1], randn(4, 1, 1).expand(4, 1, 6), 7)


def test_what_is_not_finite_stays_in_its_row():
    d, ids = randn(2, 3, 4), torch.tensor([[0, 1, 2], [1, 1, 3]], device=DEVICE)
    d[0, 1, 2] = float("nan")
    gradient, found = kernel.sums(ids, d, 5, BOTH)
    for of_rows in (gradient, found["sum_of_squares"]):
        assert of_rows.isnan().nonzero().tolist() == [[1, 2]]
    assert found["squared_norms"].isnan().tolist() == [True, False]


def test_squares_that_overflow_float16():
    check(torch.randint(0, 2, (2, 3), device=DEVICE), randn(2, 3, 4, dtype=torch.float16) * 1000, 2)


def test_places_beyond_32_bits(monkeypatch):
    """The last row of a table of 2^31 elements, in memory that is reserved and never touched but there."""
    rows, width = 2**21 + 1, 2**10
    monkeypatch.setattr(kernel, "FEATURES", width)
    monkeypatch.setattr(torch.Tensor, "new_zeros", torch.Tensor.new_empty)
    d, ids = randn(1, 1, width, dtype=torch.float16), torch.tensor([[rows - 1]], device=DEVICE)
    gradient, _ = kernel.sums(ids, d, rows, ())
    assert torch.equal(gradient[-1], d[0, 0])


def test_repeats_bitwise():
    ids, d = torch.randint(0, 3, (6, 50), device=DEVICE), randn(6, 50, 4)
    first, again = (kernel.sums(ids, d, 3, BOTH) for _ in range(2))
    assert torch.equal(first[0], again[0]) and all(torch.equal(first[1][k], again[1][k]) for k in BOTH)
