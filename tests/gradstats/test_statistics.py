"""From raw sums to numbers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradstats import GradstatsError
from gradstats.statistics import Norms, SecondMoment, Variance, Window, second_moment_at


def window(g, loss_reduction="mean"):
    scale = len(g) if loss_reduction == "mean" else 1
    c = g / scale
    sums = {"sum_of_squares": c.square().sum(0), "squared_norms": c.square().flatten(1).sum(1)}
    return Window(sums, c.sum(0), len(g), loss_reduction)


@pytest.mark.parametrize("loss_reduction", ["mean", "sum"])
def test_definitions(loss_reduction):
    g = torch.randn(7, 3, 2, dtype=torch.float64) + 1
    w = window(g, loss_reduction)
    torch.testing.assert_close(SecondMoment.read(w), g.square().mean(0))
    torch.testing.assert_close(Variance.read(w), g.var(0))
    torch.testing.assert_close(Norms.read(w), g.flatten(1).norm(dim=1))
    torch.testing.assert_close(w.mean, g.mean(0))


def test_variance_is_never_negative():
    """Equal gradients in float32: q - m^2 is rounding noise of either sign."""
    g = torch.rand(1, 1000).repeat(33, 1) * 100
    s2 = Variance.read(window(g))
    assert (s2 >= 0).all()
    assert (s2 <= 1e-5 * g[0].square()).all()


@given(b=st.integers(2, 40), r=st.floats(1, 40), seed=st.integers(0, 99))
def test_second_moment_at(b, r, seed):
    g = torch.randn(b, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.5
    q, m = g.square().mean(0), g.mean(0)
    found = second_moment_at(q, m, b, r)
    torch.testing.assert_close(found, m.square() + (1 / r - 1 / b) * g.var(0))
    torch.testing.assert_close(second_moment_at(q, m, b, 1), q)
    torch.testing.assert_close(second_moment_at(q, m, b, b), m.square())
    assert r > b or (found > -1e-12).all()


def test_second_moment_at_is_unbiased():
    """E v_R = mu^2 + sigma^2/R over many batches, below, at and above B."""
    mu, sigma, b = 0.7, 1.5, 8
    g = mu + sigma * torch.randn(400_000, b, dtype=torch.float64)
    q, m = g.square().mean(1), g.mean(1)
    for r in (1, 3, 8, 64, float("inf")):
        found = second_moment_at(q, m, b, r).mean()
        assert abs(found - (mu**2 + sigma**2 / r)) < 0.01


def test_one_example_has_no_variance():
    with pytest.raises(GradstatsError, match="one example"):
        second_moment_at(torch.ones(2), torch.ones(2), 1, 4)
