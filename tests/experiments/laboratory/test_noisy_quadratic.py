"""Against recursions of mean and covariance, and sums written out."""

import math

import numpy as np
import pytest

from experiments.laboratory.quadratic import stationary_variance
from experiments.laboratory.sgd_momentum.noisy_quadratic import (
    Gradients,
    descend,
    difference,
    examples_to,
    momentum_of,
    total_effect,
)

B, HORIZON, LR = 4, 20.0, 0.01


def heavy_ball(lr: float, momentum: float, batch_size: int, steps: int) -> tuple[list[float], float]:
    """Mean of theta after every step, and its variance after the last, by the recursion of (theta, velocity)."""
    a = np.array([[1 - lr, -lr * momentum], [1.0, momentum]])
    b = np.array([-lr, 1.0]) / math.sqrt(batch_size)
    state, covariance, means = np.array([1.0, 0.0]), np.zeros((2, 2)), []
    for _ in range(steps):
        state, covariance = a @ state, a @ covariance @ a.T + np.outer(b, b)
        means.append(float(state[0]))
    return means, float(covariance[0, 0])


@pytest.mark.parametrize(("lr", "momentum"), [(0.1, 0.0), (0.05, 0.9), (1.5, 0.5)])
def test_the_stationary_variance_is_that_of_the_recursion(lr: float, momentum: float) -> None:
    assert stationary_variance(lr, 1 / B, momentum=momentum) == pytest.approx(
        heavy_ball(lr, momentum, B, 4000)[1], rel=1e-9
    )


@pytest.mark.parametrize("method", ["torch", "heavy_ball", "ewma"])
def test_mean_and_variance_of_the_heavy_ball(method: str) -> None:
    steps = 400
    found = descend(method, B, B, LR, HORIZON, 1.0, steps, 2000, 0)
    momentum = momentum_of(HORIZON, B)
    means, _ = heavy_ball(B * LR * (1 - momentum), momentum, B, steps)
    assert found["examples"][0] == 0 and found["examples"][-1] == steps * B
    expected = [means[examples // B - 1] for examples in found["examples"][1:]]
    assert found["mean"][1:] == pytest.approx(expected, abs=0.01)
    limit = stationary_variance(B * LR * (1 - momentum), 1 / B, momentum=momentum)
    assert found["variance"] == pytest.approx(limit, rel=0.05)
    assert (found["of_average"] is None) == (method != "ewma")


def test_torch_keeps_its_lr_at_another_batch_size() -> None:
    found = descend("torch", 4 * B, B, LR, HORIZON, 1.0, 400, 2000, 0)
    momentum = momentum_of(HORIZON, B)
    means, _ = heavy_ball(B * LR * (1 - momentum), momentum, 4 * B, 400)
    assert found["mean"][-1] == pytest.approx(means[-1], abs=0.01)
    limit = stationary_variance(B * LR * (1 - momentum), 1 / (4 * B), momentum=momentum)
    assert found["variance"] == pytest.approx(limit, rel=0.05)


def test_gradients_of_few_informative_examples() -> None:
    slope, noise = Gradients(200_000, 8, 0.25, 0).draw()
    assert float(slope.mean()) == pytest.approx(0.25, rel=0.02)
    assert float(slope.var()) == pytest.approx(0.25 * 0.75 / 8, rel=0.02)
    assert float(noise.var()) == pytest.approx(0.25 / 8, rel=0.02)


def test_methods_are_compared_on_one_stream() -> None:
    assert 0 < difference("torch+ewma", B, LR, HORIZON, 50, 5, 0) < 1e-13
    assert difference("torch+debiased_ewma", B, LR, HORIZON, 50, 5, 0) > 0.05


def test_the_total_effect_is_a_sum_of_weights() -> None:
    momentum = momentum_of(HORIZON, B)
    k = np.arange(2000)
    first = {
        "torch": 1.0,
        "heavy_ball": 1.0,
        "ewma": 1.0,
        "plain": 1.0,
        "dampened": 1 / (1 - momentum),
        "debiased_ewma": ((1 - momentum) * momentum**k / (1 - momentum ** (k + 1))).sum(),
        # The plain mean of the first five batches, and from the sixth on a weight of 1/5 that decays by 4/5.
        "slides": sum(1 / (i + 1) for i in range(5)) + 4 / 5,
    }
    for method, expected in first.items():
        found = total_effect(method, B, False, HORIZON, 4)
        assert found["examples"][:3] == [0, B, 2 * B] and len(found["effect"]) == 20
        assert found["effect"][0] == pytest.approx(expected, rel=1e-9), method
        assert found["effect"][-1] == pytest.approx(1, rel=0.05), method


def test_only_the_heavy_ball_has_one_total_effect_at_mixed_batch_sizes() -> None:
    mixed = {method: total_effect(method, B, True, HORIZON, 4) for method in ("heavy_ball", "ewma", "torch")}
    assert mixed["heavy_ball"]["examples"][:4] == [0, 1, 5, 21]
    assert mixed["heavy_ball"]["effect"] == pytest.approx([1.0] * len(mixed["heavy_ball"]["effect"]), rel=1e-9)
    assert max(abs(effect - 1) for effect in mixed["ewma"]["effect"]) > 0.05
    assert mixed["torch"]["effect"][:3] == pytest.approx([4, 1, 0.25])  # a batch counts as one of the tuned size


def test_the_time_to_a_level_is_interpolated() -> None:
    curve = {"examples": [0, 10, 20, 30], "mean": [1.0, 0.6, 0.2, 0.3]}
    assert examples_to(0.5, curve) == pytest.approx(12.5)
    assert examples_to(0.2, curve) == 20
    assert math.isnan(examples_to(0.1, curve))
