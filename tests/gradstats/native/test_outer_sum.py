"""The kernel against the stack of contributions that it never forms."""

import resource
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.benchmarks.meter import Profiled
from gradstats import native
from gradstats.forms.outer import OuterSum
from gradstats.native import build, outer_sum
from tests.allocations import LargestAllocation

BOTH = ("sum_of_squares", "squared_norms")
DEFINITIONS = {"sum_of_squares": lambda c: c.square().sum(0), "squared_norms": lambda c: c.square().sum((1, 2))}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5}
# Several tasks in both directions with parts of tiles at their ends, few positions and more, several examples packed
# together and one that is too long.
LARGE = [(3, 3, 390, 201), (5, 7, 390, 201), (90, 3, 9, 7), (2, 300, 13, 70), (1, 1, 200, 500)]
ONE = (90, 1, 390, 201)  # one position, and more examples than are packed together
SIZE = st.integers(1, 40)
# Processors that have one have those before it.
CAPABILITY = torch.backends.cpu.get_cpu_capability()
INSTRUCTIONS = ["DEFAULT", "AVX2", "AVX512"] if CAPABILITY.startswith("AVX") else [CAPABILITY]

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")


def operands(n, t, o, i, dtype=torch.float64):
    return torch.randn(n, t, o, dtype=torch.float64).to(dtype), torch.randn(n, t, i, dtype=torch.float64).to(dtype)


def check(d, a, names=BOTH):
    assert outer_sum.serves(d, a)
    c = torch.einsum("nto,nti->noi", d.double(), a.double())
    tolerance = TOLERANCE[d.dtype]
    gradient, found = outer_sum.sums(d, a, names)
    assert gradient.dtype == d.dtype and set(found) == set(names)
    rounded = c.sum(0).to(d.dtype).double()
    torch.testing.assert_close(gradient.double(), rounded, rtol=tolerance, atol=tolerance * float(c.abs().sum(0).max()))
    for name, value in found.items():
        torch.testing.assert_close(value.double(), DEFINITIONS[name](c), rtol=tolerance, atol=tolerance)
        assert value.dtype == (torch.float64 if d.dtype == torch.float64 else torch.float32)


@given(n=SIZE, t=st.integers(1, 9), o=SIZE, i=SIZE, seed=st.integers(0, 99))
@settings(deadline=None)
def test_any_size(n, t, o, i, seed):
    torch.manual_seed(seed)
    check(*operands(n, t, o, i))


@pytest.mark.parametrize("names", [BOTH, BOTH[:1], BOTH[1:]])
@pytest.mark.parametrize("sizes", [*LARGE, ONE])
def test_each_sum_alone_and_both(sizes, names):
    check(*operands(*sizes), names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", LARGE)
def test_dtypes(sizes, dtype):
    check(*operands(*sizes, dtype))


@pytest.mark.parametrize("instructions", INSTRUCTIONS[: INSTRUCTIONS.index(CAPABILITY) + 1])
@pytest.mark.parametrize("sizes", [*LARGE, ONE])
def test_every_width_of_vectors(sizes, instructions, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: instructions)
    kernels = build.library.__wrapped__("outer_sum")
    assert kernels is not None
    monkeypatch.setattr(native, "library", lambda name: kernels)
    for dtype in (torch.float64, torch.float32):
        for names in (BOTH, BOTH[:1]):
            check(*operands(*sizes, dtype), names)


def test_operands_are_read_where_they_lie():
    """Transposed, reversed in the order of dimensions, every other number, the same number again."""
    d, a = torch.randn(6, 5, 12, dtype=torch.float64), torch.randn(5, 14, 7, dtype=torch.float64)
    check(d.transpose(0, 1), a[:, :, :6].mT)
    check(d.permute(2, 0, 1)[..., ::2], a.permute(1, 2, 0)[:12, :6])
    check(d[:, :1].expand(6, 4, 12), a[0, :1].expand(6, 4, 7))


@pytest.mark.parametrize("sizes", [*LARGE, (1500, 8, 390, 401)])  # the last long enough for threads to run together
def test_threads_change_no_bit(sizes):
    d, a = operands(*sizes, torch.float32)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        gradient, found = outer_sum.sums(d, a, BOTH)
        results.append(torch.cat([gradient.flatten(), *(found[name].flatten() for name in BOTH)]))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan, 1e38])
@pytest.mark.parametrize("t", [2, 7])
def test_what_is_not_finite_stays_so_and_stays_where_it_is(bad, t):
    d, a = operands(9, t, 50, 60, torch.float32)
    d[2, 1, 17] = d[4, 1, 17] = a[6, 0, 33] = bad
    a[4, 1, 3] = 0.0
    c = torch.einsum("nto,nti->noi", d, a)
    gradient, found = outer_sum.sums(d, a, BOTH)
    torch.testing.assert_close(gradient, c.sum(0), rtol=1e-4, atol=1e-4, equal_nan=True)
    for name, value in found.items():
        torch.testing.assert_close(value, DEFINITIONS[name](c), rtol=1e-4, atol=1e-4, equal_nan=True)


def test_what_is_left_to_torch():
    d, a = operands(2, 3, 4, 5)
    assert outer_sum.serves(d, a)
    assert not outer_sum.serves(d.half(), a.half())
    assert not outer_sum.serves(d, a.float())
    assert not outer_sum.serves(d.to("meta"), a.to("meta"))
    assert not outer_sum.serves(d[:0], a[:0]) and not outer_sum.serves(d[..., :0], a)
    assert not outer_sum.serves(d.as_subclass(type("Own", (torch.Tensor,), {})), a)
    negated = torch.complex(torch.zeros_like(a), a).conj().imag  # whose memory holds a
    assert not outer_sum.serves(d, negated) and not outer_sum.serves(negated, d)
    assert not outer_sum.serves(torch._efficientzerotensor(d.shape, dtype=d.dtype), a)


def test_a_sum_over_many_examples_keeps_its_digits():
    """In one register 0.1 would be added up with an error of 3e-4."""
    d = torch.full((50_000, 1, 4), 0.1)
    gradient, found = outer_sum.sums(d, d, BOTH[:1])
    expected = d[0, 0].double().outer(d[0, 0].double())
    torch.testing.assert_close(gradient.double(), 50_000 * expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(found["sum_of_squares"].double(), 50_000 * expected.square(), rtol=1e-5, atol=0)


def test_it_can_be_turned_off(monkeypatch):
    form = OuterSum(*operands(2, 3, 4, 5))
    assert "native" in form.ways(BOTH)
    monkeypatch.setattr(native, "enabled", False)
    assert "native" not in form.ways(BOTH)


def test_nothing_larger_than_the_parameter_is_allocated():
    """Whatever the number of examples."""
    d, a = operands(1, 2, 600, 700, torch.float32)
    with LargestAllocation() as largest:
        outer_sum.sums(d.expand(500, 2, 600), a.expand(500, 2, 700), BOTH)
    assert largest.elements == 600 * 700


def test_memory_of_one_position_is_that_of_the_results():
    """No squares; what threads pack they keep."""
    d, a = operands(256, 1, 700, 800, torch.float32)
    meter = Profiled()
    with meter.contestant(), meter.steps():
        outer_sum.sums(d, a, BOTH[:1])
    assert meter.peak == 2 * 700 * 800 * 4


def test_memory_that_is_refused_is_an_error_and_not_the_end_of_the_process():
    d = torch.randn(1, 1, 192).expand(1, 200_000, 192)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**27, before[1]))
    try:
        with pytest.raises(MemoryError, match="200000"):
            outer_sum.sums(d, d, BOTH)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    check(*operands(2, 3, 4, 5))
