from math import gamma, prod

import numpy as np
import pytest

from experiments.laboratory.quadratic import left_for_ever, moments, power_rates, stationary_variance


def test_rates_of_c_over_t_go_by_the_gamma_function() -> None:
    mean, _ = moments(power_rates(0.5, 1, 60), noise=1.0, start=3.0)
    exact = [3 * gamma(t + 0.5) / (gamma(0.5) * gamma(t + 1)) for t in range(1, 61)]
    assert mean == pytest.approx(exact, rel=1e-10)


def test_one_over_t_is_the_plain_mean() -> None:
    mean, variance = moments(power_rates(1.0, 1, 50), noise=4.0, start=3.0)
    assert mean == pytest.approx(np.zeros(50))
    assert variance == pytest.approx(4.0 / np.arange(1, 51))


@pytest.mark.parametrize(("rate", "curvature"), [(0.1, 1.0), (1.9, 1.0), (0.5, 0.2)])
def test_a_constant_rate_comes_to_rest_at_the_stationary_variance(rate: float, curvature: float) -> None:
    _, variance = moments(np.full(400, rate), 2.0, 1.0, curvature)
    limit = stationary_variance(rate, 2.0, curvature)
    assert variance[-1] == pytest.approx(limit, rel=1e-6)
    assert variance[0] == pytest.approx(rate**2 * 2.0)


def test_at_twice_the_inverse_curvature_the_variance_grows_without_end() -> None:
    mean, variance = moments(np.full(10, 4.0), noise=1.0, start=3.0, curvature=0.5)
    assert mean == pytest.approx(3.0 * (-1.0) ** np.arange(1, 11))
    assert variance == pytest.approx(16.0 * np.arange(1, 11))


@pytest.mark.parametrize("scale", [0.25, 0.5])
def test_what_is_left_for_ever_is_the_infinite_product(scale: float) -> None:
    assert left_for_ever(scale) == pytest.approx(prod(1 - scale / t**2 for t in range(1, 100_000)), rel=1e-4)
