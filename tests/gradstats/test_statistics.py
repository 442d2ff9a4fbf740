"""From raw sums to numbers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradstats.statistics import Norms, SecondMoment, Variance, Window, reference_weight


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


def v(g, r):
    """v_R of a batch g (B, ...)."""
    return torch.lerp(g.mean(0).square(), g.square().mean(0), reference_weight(len(g), r))


@given(b=st.integers(2, 40), r=st.floats(1, 40), seed=st.integers(0, 99))
def test_second_moment_at_a_reference_batch_size(b, r, seed):
    g = torch.randn(b, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.5
    torch.testing.assert_close(v(g, r), g.mean(0).square() + (1 / r - 1 / b) * g.var(0))
    torch.testing.assert_close(v(g, 1), g.square().mean(0))
    torch.testing.assert_close(v(g, b), g.mean(0).square())
    assert r > b or (v(g, r) > -1e-12).all()


def test_second_moment_at_a_reference_batch_size_is_unbiased():
    """E v_R = mu^2 + sigma^2/R over many batches, below, at and above B."""
    mu, sigma, b = 0.7, 1.5, 8
    g = mu + sigma * torch.randn(b, 400_000, dtype=torch.float64)
    for r in (1, 3, 8, 64, float("inf")):
        assert abs(v(g, r).mean() - (mu**2 + sigma**2 / r)) < 0.01
