"""Every form against the stack of contributions that it stands for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradstats.contribution import Dense, Outer, OuterSum, Rows

SIZE = st.integers(1, 6)
BOTH = ("sum_of_squares", "squared_norms")


def check(form, c):
    """gradient, both sums, and each sum alone (norms alone take another path)."""
    expected = {"sum_of_squares": c.square().sum(0), "squared_norms": c.flatten(1).square().sum(1)}
    torch.testing.assert_close(form.gradient(), c.sum(0))
    for names in (BOTH, BOTH[:1], BOTH[1:]):
        gradient, found = form.sums(names)
        torch.testing.assert_close(gradient, c.sum(0))
        assert set(found) == set(names)
        for name in names:
            torch.testing.assert_close(found[name], expected[name])


@given(n=SIZE, t=st.integers(1, 20), i=SIZE, o=SIZE, seed=st.integers(0, 99))
@settings(deadline=None)
def test_forms(n, t, i, o, seed):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    d, a = randn(n, t, o), randn(n, t, i)
    check(OuterSum(d, a), torch.einsum("nto,nti->noi", d, a))
    check(Outer(d[:, 0], a[:, 0]), torch.einsum("no,ni->noi", d[:, 0], a[:, 0]))
    check(Dense(d), d)
    ids = torch.randint(0, i, (n, t), generator=generator)
    one_hot = torch.nn.functional.one_hot(ids, i).double()
    check(Rows(ids, d, i), torch.einsum("ntr,nto->nro", one_hot, d))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_squares_of_low_precision_are_float32(dtype):
    """300^2 overflows float16."""
    d, a = torch.full((2, 3, 4), 300.0, dtype=dtype), torch.ones(2, 3, 5, dtype=dtype)
    for form in (Dense(d), Outer(d[:, 0], a[:, 0]), OuterSum(d, a), Rows(torch.zeros(2, 3, dtype=torch.long), d, 5)):
        gradient, found = form.sums(BOTH)
        assert gradient.dtype == dtype
        for value in found.values():
            assert value.dtype == torch.float32 and value.isfinite().all()


def test_norms_alone_never_form_an_example_gradient(monkeypatch):
    """Few positions go through Gram matrices."""
    form = OuterSum(torch.randn(3, 4, 64), torch.randn(3, 4, 64))
    monkeypatch.setattr(OuterSum, "example", lambda self, n: pytest.fail("formed an example's gradient"))
    assert form.sums(("squared_norms",))[1]["squared_norms"].shape == (3,)
