"""The backward pass of LayerNorm and RMSNorm against autograd in float64, an example at a time."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from gradstats.kernels import normalization
from tests.gradstats.kernels.conftest import DEVICE

ALL = frozenset({"input", "weight", "bias"})
# Of dx to the layer's dtype: the interpreter truncates bfloat16.
ROUNDING = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape, device=DEVICE).to(dtype)


def error(found, expected):
    assert found.shape == expected.shape
    return float((found.double() - expected).norm() / expected.norm().clamp(min=1e-300))


def oracle(d, x, weight, eps, centered):
    x, w, b = (t.double().detach().requires_grad_() for t in (x, weight, torch.zeros_like(weight)))
    shape, rows = tuple(weight.shape), []
    for n in range(len(x)):
        y = F.layer_norm(x[n], shape, w, b, eps) if centered else F.rms_norm(x[n], shape, w, eps) + b
        rows.append(torch.autograd.grad(y, (x, w, b), d[n].double()))
    dx, of_weight, of_bias = zip(*rows, strict=True)
    return torch.stack(dx).sum(0), torch.stack(of_weight), torch.stack(of_bias)


def check(d, x, weight, centered, eps=1e-5):
    found = normalization.backward(d, x, weight, eps, centered, ALL)
    for one, expected, rounding in zip(
        found, oracle(d, x, weight, eps, centered), (ROUNDING[x.dtype], 3e-6, 1e-6), strict=True
    ):
        assert error(one, expected) <= rounding
    assert found[0].dtype == x.dtype and found[1].dtype == found[2].dtype == torch.float32


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 9),
    st.integers(3, 70),
    st.sampled_from(sorted(ROUNDING, key=str)),
    st.booleans(),
)
def test_any_shape(n, t, f, dtype, centered):
    torch.manual_seed(0)
    x = randn(n, t, f, dtype=dtype) * 3 + 1
    check(randn(n, t, f, dtype=dtype), x, randn(f, dtype=dtype), centered)


@pytest.mark.parametrize("centered", [True, False])
def test_layouts(centered):
    check(randn(3, 20), randn(3, 20), randn(20), centered)  # no positions
    check(randn(2, 3, 4, 5, 6), randn(2, 3, 4, 5, 6), randn(5, 6), centered)  # several, and several normalised
    d, x = randn(4, 2, 24)[:, :, ::2], randn(12, 2, 4).permute(2, 1, 0)
    assert not d.is_contiguous() and not x.is_contiguous()
    check(d, x, randn(24)[::2], centered)
    check(randn(1, 1, 12).expand(4, 2, 12), x, randn(12), centered)


@pytest.mark.parametrize("elements", [1, 64])
def test_long_rows_and_many_positions(elements, monkeypatch):
    monkeypatch.setattr(normalization, "ELEMENTS", elements)
    monkeypatch.setattr(normalization, "PROGRAMS", 2)
    for t in (7, 8, 9):
        check(randn(2, t, 16), randn(2, t, 16), randn(16), True)


def test_mixed_dtypes():
    check(randn(2, 3, 8, dtype=torch.bfloat16), randn(2, 3, 8, dtype=torch.bfloat16), randn(8), True)


@pytest.mark.parametrize("eps", [0.0, 1e-5])
def test_rows_of_zeros(eps):
    """What lies beyond the last position is a row of zeros too, whose scale is infinite without eps."""
    check(randn(1, 31, 8), randn(1, 31, 8), randn(8), False, eps)  # two positions a program, but for the last
    if eps:
        x = randn(1, 3, 8)
        x[0, 1] = 0
        check(randn(1, 3, 8), x, randn(8), True, eps)


def test_what_is_not_wanted_is_not_computed():
    dx, _, bias = normalization.backward(randn(2, 3, 8), randn(2, 3, 8), randn(8), 1e-5, True, frozenset({"weight"}))
    assert dx is None and bias is None


def test_nan_stays_in_its_row():
    x, d = randn(3, 4, 8), randn(3, 4, 8)
    x[1, 2, 3] = float("nan")
    dx, weight, _ = normalization.backward(d, x, randn(8), 1e-5, True, ALL)
    assert torch.equal(dx.isnan().any(2), x.isnan().any(2))
    assert torch.equal(weight.isnan().any(1), x.isnan().any(2).any(1))
