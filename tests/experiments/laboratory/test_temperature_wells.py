import numpy as np
import pytest
import torch
import torch.nn.functional as F

from experiments.laboratory.quadratic import stationary_variance
from experiments.laboratory.temperature.wells import (
    Well,
    expected_excess,
    quadratic_variance,
    relaxed,
    well_at_minimum,
    well_excess,
)

# A tenth of the images: what is measured here are equations.
PROBLEM = "data=digits model=mlp data.test_fraction=0.9"


@pytest.mark.parametrize(("rate", "batch_size", "curvature"), [(0.2, 1, 1.0), (0.5, 4, 0.4), (1.6, 2, 1.0)])
def test_the_variance_is_the_stationary_one(rate: float, batch_size: int, curvature: float) -> None:
    found = quadratic_variance(rate, batch_size, curvature, noise=2.0, repetitions=4000, seed=0)
    assert found == pytest.approx(stationary_variance(rate, 4.0 / batch_size, curvature), rel=0.06)


def test_a_minimum_has_no_gradient_and_is_below_its_surroundings() -> None:
    well = Well(PROBLEM, penalty=0.1)
    lowest = well.value()
    assert max(float(p.grad.abs().max()) for p in well.parameters if p.grad is not None) < 1e-6
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        well.model.weight += 1e-2 * torch.randn(well.model.weight.shape, generator=generator, dtype=torch.float64)
    assert well.value() > lowest


def test_at_the_minimum_the_data_pull_against_the_penalty() -> None:
    well = Well(PROBLEM, penalty=0.1)
    well.model.zero_grad()
    F.cross_entropy(well.model(well.data.x), well.data.y).backward()
    for p in well.parameters:
        torch.testing.assert_close(p.grad, -0.1 * p.detach(), atol=1e-6, rtol=0)


def test_hessian_and_noise_at_the_minimum() -> None:
    found = well_at_minimum(PROBLEM, penalty=0.1)
    curvatures, noise = np.array(found["curvatures"]), np.array(found["noise"])
    n = len(Well(PROBLEM, 0.1).data)
    # Directions in which the data do not bend the loss have the curvature of the penalty.
    assert curvatures.min() == pytest.approx(0.1)
    # The trace is the same along any axes; gradstats estimates it without bias.
    assert noise.sum() * n / (n - 1) == pytest.approx(found["trace"])


def test_the_excess_loss_is_foretold_at_low_temperature() -> None:
    penalty, rate, B = 0.3, 0.2, 16
    found = well_at_minimum(PROBLEM, penalty)
    foretold = expected_excess(np.array(found["curvatures"]), np.array(found["noise"]), rate, B)
    measured = np.mean([well_excess(PROBLEM, penalty, rate, B, seed) for seed in range(12)])
    assert foretold == pytest.approx(measured, rel=0.1)


def test_at_small_rates_the_excess_is_a_quarter_of_the_trace_times_the_temperature() -> None:
    noise = np.array([1.0, 2.0])
    assert expected_excess(np.array([1.0, 3.0]), noise, 1e-6, 4) == pytest.approx(1e-6 / 4 * 3.0 / 4)
    # At eta h = 1 a direction has twice its part, of eta/(2B) s / (2 - eta h).
    assert expected_excess(np.array([1.0]), np.array([1.0]), 1.0, 1) == pytest.approx(0.5)


def test_it_takes_longer_to_forget_a_start_at_small_rates_and_curvatures() -> None:
    assert relaxed(0.1, 0.5) == 60
    assert relaxed(0.2, 0.5) == 30
