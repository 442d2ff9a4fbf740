"""Running averages in examples."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradstats import GradstatsError
from gradstats.units import DebiasedEWMA, Slides, average

RHO = st.floats(0.01, 0.999999)
BATCHES = st.lists(st.integers(1, 300), min_size=1, max_size=12)


def run(average, batches, values):
    x, e = 0.0, 0
    for b, value in zip(batches, values, strict=True):
        e += b
        w = average.weight(b, e)
        x = (1 - w) * x + w * value
    return x


@given(rho=RHO, batches=BATCHES)
def test_exponential_weights_examples_by_age(rho, batches):
    """The explicit sum: every example of age a has weight rho^a, normalised."""
    total = sum(batches)
    values = [float(i) for i in range(len(batches))]
    owner = [i for i, b in enumerate(batches) for _ in range(b)]
    # A batch is one observation: its examples share the weight of the batch, rho^(age of its newest).
    weights = [(1 - rho**b) * rho ** (total - sum(batches[: i + 1])) for i, b in enumerate(batches)]
    expected = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
    assert len(owner) == total
    assert math.isclose(run(DebiasedEWMA(rho), batches, values), expected, rel_tol=1e-9, abs_tol=1e-9)


@given(rho=RHO, batches=BATCHES, parts=st.integers(2, 5), horizon=st.integers(1, 2000))
def test_splitting_batches_changes_nothing(rho, batches, parts, horizon):
    """Parts of a batch that carry the same value leave the exponential average where the whole batch does."""
    values = [math.sin(i + 1) for i in range(len(batches))]
    whole = run(DebiasedEWMA(rho), [b * parts for b in batches], values)
    split = run(
        DebiasedEWMA(rho), [b for b in batches for _ in range(parts)], [v for v in values for _ in range(parts)]
    )
    assert math.isclose(whole, split, rel_tol=1e-9, abs_tol=1e-12)


@given(beta=st.floats(0.1, 0.9999), b=st.integers(1, 512), steps=st.integers(1, 30))
def test_exponential_is_adams_debiased_average_at_the_tuned_batch_size(beta, b, steps):
    values = [math.cos(i) for i in range(steps)]
    m = 0.0
    for value in values:
        m = beta * m + (1 - beta) * value
    adam = m / (1 - beta**steps)
    assert math.isclose(run(average("debiased_ewma", beta, b), [b] * steps, values), adam, rel_tol=1e-7, abs_tol=1e-9)


@given(batches=BATCHES)
def test_slides_average_is_the_plain_mean_within_the_horizon(batches):
    values = [math.sin(i) for i in range(len(batches))]
    mean = sum(b * v for b, v in zip(batches, values, strict=True)) / sum(batches)
    assert math.isclose(run(Slides(sum(batches)), batches, values), mean, rel_tol=1e-9, abs_tol=1e-9)


@given(b=st.integers(1, 1000), e=st.integers(1, 10**9), horizon=st.floats(1, 1e6))
def test_weights_are_weights(b, e, horizon):
    e = max(b, e)
    assert 0 < Slides(horizon).weight(b, e) <= 1
    assert 0 < DebiasedEWMA(1 - 1 / (horizon + 1)).weight(b, e) <= 1
    assert DebiasedEWMA(0.0).weight(b, e) == 1


def test_slides_horizon_has_torchs_limit_weight():
    assert average("slides", 0.9, 64).weight(64, 10**9) == pytest.approx(0.1)


def test_unknown_average():
    with pytest.raises(GradstatsError, match="debiased_ewma"):
        average("linear", 0.9, 1)
