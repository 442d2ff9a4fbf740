"""The kernel of a Linear with positions against contributions in float64."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradstats.kernels import linear
from tests.gradstats.kernels.conftest import DEVICE

BOTH = ("sum_of_squares", "squared_norms")
FAR = 2**31 + 8
TILE = linear.Tile(16, 32, 16, 4)
# Of the gradient to the layer's dtype: the interpreter truncates bfloat16. Sums are float32 whatever that is.
ROUNDING = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 8e-3}


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape, device=DEVICE).to(dtype)


def error(found, expected):
    assert found.shape == expected.shape
    return float((found.double() - expected).norm() / expected.norm().clamp(min=1e-300))


close = functools.partial(torch.testing.assert_close, equal_nan=True, rtol=1e-4, atol=1e-4)


def check(d, a, tile=TILE, names=BOTH):
    c = torch.einsum("nto,nti->noi", d.double(), a.double())
    gradient, found = linear.sums(d, a, names, tile)
    assert gradient.dtype == d.dtype and set(found) == set(names)
    assert error(gradient, c.sum(0)) <= ROUNDING[d.dtype]
    if "sum_of_squares" in names:
        assert error(found["sum_of_squares"], c.square().sum(0)) <= 1e-6
    if "squared_norms" in names:
        assert error(found["squared_norms"], c.square().sum((1, 2))) <= 1e-6


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 5),
    st.integers(0, 37),
    st.integers(1, 40),
    st.integers(1, 70),
    st.sampled_from(sorted(ROUNDING, key=str)),
    st.sampled_from([1, 2, 3, 40]),
)
def test_any_shape(n, t, o, i, dtype, splits):
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "splits", lambda *_: min(n, splits))
        check(randn(n, t, o, dtype=dtype), randn(n, t, i, dtype=dtype))


@pytest.mark.parametrize("names", [(), ("sum_of_squares",), ("squared_norms",)])
def test_what_is_not_asked_for_is_not_returned(names):
    check(randn(3, 5, 17), randn(3, 5, 33), names=names)


@pytest.mark.parametrize("positions", [4, 80])
def test_every_way(positions):
    d, a = randn(2, positions, 150), randn(2, positions, 140)
    ways = linear.ways(d, a, BOTH)
    assert len(ways) == 4
    c = torch.einsum("nto,nti->noi", d.double(), a.double())
    for way in ways.values():
        gradient, found = way()
        assert error(gradient, c.sum(0)) <= 1e-6
        assert error(found["sum_of_squares"], c.square().sum(0)) <= 1e-6


def test_tiles_are_no_larger_than_the_weight():
    d, a = randn(2, 3, 5), randn(2, 3, 100)
    assert list(linear.ways(d, a, BOTH)) == ["triton 16 x 64", "triton 16 x 128"]
    assert linear.fitted(linear.LARGE, d, a) == (16, 128, 16, 8)
    d, a = randn(2, 100, 5000), randn(2, 100, 768)
    assert linear.fitted(linear.LARGE, d, a) == (128, 128, 32, 8)
    assert linear.fitted(linear.LARGE, d.half(), a.half()) == linear.LARGE


def test_strides_are_followed():
    d, a = randn(6, 3, 40).transpose(0, 1)[:, ::2, 1::2], randn(33, 3, 3).permute(1, 2, 0)
    assert not d.is_contiguous() and not a.is_contiguous()
    check(d, a)
    check(randn(3, 1, 20).expand(3, 4, 20), randn(1, 4, 10).expand(3, 4, 10))


@pytest.mark.parametrize("strides", [(FAR // 2, 3, 1), (3, FAR // 2, 1), (3, 1, FAR // 2)])
def test_offsets_beyond_32_bits(strides):
    """The third example, position or feature lies 2^31 elements away, in memory that is reserved and never touched."""
    storage = torch.empty(FAR + 16, dtype=torch.float16, device=DEVICE)
    x, other = storage.as_strided((3, 3, 3), strides), randn(3, 3, 4, dtype=torch.float16)
    x.copy_(randn(3, 3, 3))
    check(x, other)
    check(other, x)


def test_what_is_not_finite_stays_where_it_is():
    """Infinity and NaN of one example are in its contributions only; beyond the edges of operands nothing is read."""
    for value in (float("inf"), float("nan")):
        d, a = randn(3, 5, 18), randn(3, 5, 35)
        a[1, 2, 3] = value
        c = torch.einsum("nto,nti->noi", d, a)
        gradient, found = linear.sums(d, a, BOTH, TILE)
        close(gradient, c.sum(0))
        close(found["sum_of_squares"], c.square().sum(0))
        close(found["squared_norms"], c.square().sum((1, 2)))
    padded = torch.full((3, 7, 50), float("nan"), device=DEVICE)
    d = padded[:, :5, :18].copy_(randn(3, 5, 18))
    check(d, randn(3, 5, 35))
    check(randn(3, 5, 35), d)


def test_squares_that_overflow_float16():
    d, a = randn(3, 2, 20, dtype=torch.float16) * 300, randn(3, 2, 20, dtype=torch.float16) * 300
    c = torch.einsum("nto,nti->noi", d.double(), a.double())
    gradient, found = linear.sums(d, a, BOTH, TILE)
    assert gradient.isinf().any()  # as that of torch
    assert error(found["sum_of_squares"], c.square().sum(0)) <= 1e-6


def test_partial_sums_that_overflow_float16(monkeypatch):
    monkeypatch.setattr(linear, "splits", lambda *_: 2)
    d, a = randn(2, 2, 20, dtype=torch.float16) * 300, randn(1, 2, 20, dtype=torch.float16).expand(2, 2, 20) * 300
    d[1] = -d[0]
    gradient, _ = linear.sums(d, a, (), TILE)
    assert gradient.abs().max() < 1


def test_splits():
    """A weight of few tiles is split until the device is full, evenly; one of many is not; partial sums are bounded."""
    small, large, device = linear.Tile(64, 64, 64, 4), linear.LARGE, torch.device("meta")
    assert linear.splits(900, 1, 64 * 64, small, device) == 9  # three programs a multiprocessor
    assert linear.splits(4, 1, 64 * 64, small, device) == 4
    assert linear.splits(12, 6, 6 * 64 * 64, small, device) == 3  # two rounds of four examples, not one of twelve
    assert linear.splits(32, 3, 3 * 128 * 128, large, device) == 1  # one program a multiprocessor
    assert linear.splits(100_000, 4, 1024 * 1024, large, device) <= linear.WORKSPACE / (8 * 1024 * 1024)
    assert linear.splits(32, 1, 1 << 30, large, device) == 1


def test_a_split_weight_repeats_bitwise():
    d, a = randn(7, 3, 20), randn(7, 3, 30)
    assert linear.splits(7, 2, 600, TILE, d.device) > 1
    first, again = (linear.sums(d, a, BOTH, TILE) for _ in range(2))
    assert torch.equal(first[0], again[0]) and all(torch.equal(first[1][k], again[1][k]) for k in BOTH)


def test_precision_is_torchs():
    assert linear.precision() == "ieee"
    try:
        torch.backends.cuda.matmul.allow_tf32 = True
        assert linear.precision() == "tf32"
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    assert linear.precision() == "ieee"
