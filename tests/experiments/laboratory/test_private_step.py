"""The private step against gradients one by one, against Opacus and in closed form."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradstats
from experiments.laboratory.private.accounting import noise_multiplier, poisson, spent, steps_of
from experiments.laboratory.private.methods import ADAM, CORRECTED, EPS, METHODS, SGD, build
from experiments.laboratory.private.peers import BASES, GHOST, KEPT, OURS, difference, seconds
from experiments.laboratory.private.step import SLACK, PrivateGradient, clip_factors
from experiments.laboratory.private.training import generators, trained

PROBLEM = "data=digits model=mlp model.widths=[8] model.dropout=0"


def case() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    return model, torch.randn(6, 5, dtype=torch.float64), torch.randint(0, 3, (6,))


def test_the_clipped_sum_is_that_of_gradients_one_by_one():
    model, x, y = case()
    one = gradstats.per_example_gradients(model, F.cross_entropy, x, y)
    rows = torch.cat([g.flatten(1) for g in one.values()], dim=1)
    C = float(rows.norm(dim=1).median())
    gradient = PrivateGradient(model, C, 0.0, 10, torch.Generator())
    for _ in range(2):  # nothing of a step is left for the next
        gradient.backward(x, y)
        found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        factors = (C / (rows.norm(dim=1) + SLACK)).clamp(max=1)
        torch.testing.assert_close(found, factors @ rows / 10, rtol=1e-12, atol=1e-14)
        # The median of six is the third, which is itself a little longer than C with the slack.
        assert gradient.clipped == pytest.approx(4 / 6)


def test_no_clipped_gradient_is_longer_than_the_bound():
    norms = torch.tensor([0.0, 0.5, 1.0, 100.0], dtype=torch.float64)
    clipped = clip_factors(norms, 1.0) * norms
    assert float(clipped.max()) <= 1 and clipped[1] == 0.5
    assert torch.equal(clip_factors(norms, math.inf), torch.ones(4, dtype=torch.float64))


def test_noise_is_sigma_c_over_the_expected_batch_size_also_without_examples():
    model, x, y = case()
    gradient = PrivateGradient(model, 2.0, 3.0, 10, torch.Generator().manual_seed(0))
    draws = []
    for _ in range(400):
        gradient.backward(x[:0], y[:0])
        draws.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    drawn = torch.stack(draws)
    assert float(drawn.var()) == pytest.approx(0.6**2, rel=0.02) and abs(float(drawn.mean())) < 0.01
    assert gradient.noise_variance == pytest.approx(0.36)
    assert PrivateGradient(case()[0], math.inf, 0.0, 10, torch.Generator()).noise_variance == 0


@pytest.mark.parametrize(("base", "lr"), [("SGD", 0.5), ("Adam", 1e-3)])
def test_it_is_the_step_of_opacus(base: str, lr: float):
    """Clipping and noise, with batches of another size in every step."""
    found = difference(PROBLEM, base, lr, sigma=1.0, max_norm=1.0, batch_size=32, steps=5, seed=0)
    assert set(found) == {KEPT, GHOST} and max(found.values()) < 1e-9


def test_other_noise_is_told_apart():
    """So that the comparison can fail: Opacus draws the same noise only from the same seed."""
    first, second = generators(0)[1], generators(1)[1]
    assert not torch.equal(torch.randn(3, generator=first), torch.randn(3, generator=second))
    order, noise = generators(0)
    assert not torch.equal(torch.rand(3, generator=order), torch.rand(3, generator=noise))


def test_seconds_are_of_single_steps_of_all_three():
    found = seconds(PROBLEM, "SGD", 0.1, 1.0, 1.0, batch_size=8, steps=2, seed=0)
    assert set(found) == {OURS, KEPT, GHOST} and all(len(times) == 2 and min(times) > 0 for times in found.values())


def stepped(method: str, noise_variance: float, floor: float, gradients: list[float], lr: float = 0.1) -> float:
    p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    made = build(method, [p], lr, noise_variance, floor)
    for g in gradients:
        p.grad = torch.full_like(p, g)
        made.step()
    return p.item()


@pytest.mark.parametrize("method", METHODS)
def test_without_noise_methods_are_those_of_torch(method: str):
    gradients = [1.0, -2.0, 0.5, 3.0]
    p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = BASES["SGD" if method == SGD else "Adam"]([p], lr=0.1)
    for g in gradients:
        p.grad = torch.full_like(p, g)
        optimizer.step()
    assert stepped(method, 0.0, 0.1, gradients) == pytest.approx(float(p.detach()), rel=1e-9)


def test_the_corrected_step_in_closed_form():
    """The first: m^ = g, v^ = g^2."""
    assert stepped(CORRECTED, 3.0, 0.1, [2.0]) == pytest.approx(-0.1 * 2 / (1.0 + EPS))
    assert stepped(CORRECTED, 4.0, 0.25, [1.0]) == pytest.approx(-0.1 * 1 / (1.0 + EPS))  # at the floor
    assert stepped(ADAM, 3.0, 0.1, [2.0]) == pytest.approx(-0.1 * 2 / (2.0 + EPS))


def test_the_second_moment_is_debiased():
    p = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    made = build(ADAM, [p], 0.1, 0.0, 0.0)
    for _ in range(3):
        p.grad = torch.full_like(p, 2.0)
        made.step()
    assert made.second_moment() == pytest.approx(4)
    assert math.isnan(build(SGD, [p], 0.1, 0.0, 0.0).second_moment())


@pytest.mark.parametrize("epsilon", [1.0, 8.0])
def test_the_noise_spends_what_it_may_and_hardly_less(epsilon: float):
    sigma = noise_multiplier(epsilon, 1e-4, 0.1, 100)
    assert epsilon - 0.02 < spent(sigma, 1e-4, 0.1, 100) <= epsilon
    assert spent(1.1 * sigma, 1e-4, 0.1, 100) < epsilon - 0.02
    assert noise_multiplier(None, 1e-4, 0.1, 100) == 0


def test_all_examples_in_one_step_are_the_gaussian_mechanism():
    """Without sampling the divergence of order a is a / (2 sigma^2), and epsilon the least of a / (2 sigma^2) +
    ln((a-1)/a) - (ln delta + ln a)/(a-1) (Balle et al. 2020)."""
    sigma, delta = 5.0, 1e-4
    expected = min(
        a / (2 * sigma**2) + math.log((a - 1) / a) - (math.log(delta) + math.log(a)) / (a - 1)
        for a in (1.1 + i / 100 for i in range(6000))
    )
    assert spent(sigma, delta, 1.0, 1) == pytest.approx(expected, rel=1e-3)


def test_poisson_draws_every_example_by_itself():
    drawn = list(poisson(50, 0.1, 2000, torch.Generator().manual_seed(0)))
    sizes = torch.tensor([len(indices) for indices in drawn]).double()
    assert float(sizes.mean()) == pytest.approx(5, abs=0.2) and float(sizes.var()) == pytest.approx(4.5, rel=0.1)
    assert float(sizes.min()) == 0
    assert torch.bincount(torch.cat(drawn), minlength=50).min() > 130
    assert steps_of(2, 0.1) == 20 and steps_of(0.01, 0.5) == 1


COMMON: dict[str, Any] = {
    "problem": PROBLEM,
    "delta": 1e-4,
    "max_norm": 1.0,
    "batch_size": 64,
    "epochs": 3,
    "floor": 0.1,
    "octave": 0.0,
    "seed": 0,
}


def test_a_private_run_learns_and_tells_what_it_spent():
    found = trained(method=CORRECTED, lr=0.008, epsilon=8.0, **COMMON)
    assert 0 < found["epsilon"] <= 8 and found["sigma"] > 0 and found["steps"] == 67
    assert found["test_accuracy"] > 0.3 and 0 < found["clipped"] <= 1 and 0.5 < found["noise_share"] < 1.1
    free = trained(method=SGD, lr=0.5, epsilon=None, **COMMON)
    assert free["epsilon"] is None and free["clipped"] == free["sigma"] == 0
    assert free["loss"] < found["loss"]


def test_a_loss_is_never_more_than_that_of_the_initial_model():
    free = trained(method=SGD, lr=1e6, epsilon=None, **COMMON | {"epochs": 0.5})
    assert 2 < free["loss"] < 3
