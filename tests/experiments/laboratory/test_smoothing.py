"""Averages against sums written out, and their errors against closed forms."""

import numpy as np
import pytest

from experiments.laboratory.running_averages.smoothing import (
    AVERAGES,
    PHASES,
    SIGNALS,
    averaged,
    measure,
    split_error,
    trace,
    window,
)

N = 8
BETA = 1 - 1 / N
X = np.random.default_rng(0).normal(size=(40, 3))


@pytest.mark.parametrize("kind", AVERAGES)
@pytest.mark.parametrize("t", [1, 5, N, N + 1, 2 * N, 40])
def test_averages_are_the_sums_of_their_definitions(kind: str, t: int) -> None:
    past = X[:t]
    decayed = BETA ** np.arange(t - 1, -1, -1)[:, None]
    slides = X[: min(t, N)].mean(axis=0)
    for x in X[N:t]:
        slides = (1 - 1 / N) * slides + x / N
    expected = {
        "mean": past.mean(axis=0),
        "ewma": (1 - BETA) * (decayed * past).sum(axis=0),
        "debiased_ewma": (decayed * past).sum(axis=0) / decayed.sum(),
        "slides": slides,
        "window": past[-(2 * N - 1) :].mean(axis=0),
    }
    assert averaged(kind, N, X)[t - 1] == pytest.approx(expected[kind], abs=1e-12)


def test_the_error_is_split_into_tracking_and_noise() -> None:
    values = np.array([[[1.0, 3.0]], [[5.0, 5.0]]])  # (T, signals, draws)
    tracking, noise = split_error(values, np.array([[0.0], [3.0]]))
    assert noise.tolist() == [[2.0], [0.0]]
    assert tracking.tolist() == [[4.0 - 1.0], [4.0]]


def test_almost_without_noise_the_lag_behind_a_cosine_is_that_of_the_transfer_function() -> None:
    horizon, period = 20, 200
    found = measure(horizon, 4000, period, 1.0, 1e-9, 2, 0)
    z = np.exp(-2j * np.pi / period)
    beta, n = 1 - 1 / horizon, window(horizon)
    responses = {
        "ewma": (1 - beta) / (1 - beta * z),
        "window": (1 - z**n) / (1 - z) / n,
    }
    responses["debiased_ewma"] = responses["slides"] = responses["ewma"]
    for kind, response in responses.items():
        lag = found["tracking"][AVERAGES.index(kind)][SIGNALS.index("cosine")][PHASES.index("settled")]
        assert lag == pytest.approx(abs(1 - response) ** 2 / 2, rel=1e-6)


def test_noise_level_and_distance_are_those_of_the_weights() -> None:
    horizon = 40
    found = measure(horizon, 160, 160, 2.0, 0.5, 4000, 0)
    at = {kind: AVERAGES.index(kind) for kind in AVERAGES}
    for kind, share in {
        "mean": 1 / horizon,
        "slides": 1 / horizon,
        "window": 1 / horizon,
        "ewma": (1 - (1 - 1 / horizon) ** (2 * horizon)) / window(horizon),
    }.items():
        assert found["noise_at_horizon"][at[kind]] == pytest.approx(0.25 * share, rel=0.1)
    t = np.arange(1, 11)  # the first quarter
    assert found["level"][at["ewma"]] == pytest.approx((1 - (1 - 1 / horizon) ** t).mean(), rel=0.01)
    assert found["level_of_start"][at["ewma"]] == pytest.approx(1, rel=0.01)
    assert found["level"][at["debiased_ewma"]] == pytest.approx(1, rel=0.01)
    weights = [(1 - 1 / horizon) ** np.arange(n) for n in t]
    expected = [((w / w.sum() - 1 / len(w)) ** 2).sum() for w in weights]
    assert found["apart"][at["debiased_ewma"]] == pytest.approx(np.sqrt(np.mean(expected) / np.mean(1 / t)), rel=0.1)
    assert found["apart"][at["slides"]] == 0


def test_the_trace_is_of_few_points_and_begins_with_the_data() -> None:
    shown = trace(80, 4000, 1000, 1.0, 1.0, 0)
    for signal, last in zip(SIGNALS, (4 * 80, 2000), strict=True):
        one = shown[signal]
        assert one["examples"][0] == 1 and last - 10 < one["examples"][-1] <= last
        assert len(one["examples"]) == len(one["data"]) == len(one["averages"][0]) <= 320
        assert one["averages"][AVERAGES.index("slides")][0] == one["data"][0]
