"""The gradient noise scale: unbiased estimates, their running averages, and how well the ratio is known."""

import math

import pytest
import torch
from torch import nn

import gradstats
from gradstats.errors import GradstatsError
from gradstats.noise_scale import NoiseEstimate, NoiseScale, estimate

P, G2, TRACE = 20, 0.5, 30.0  # elements, |G|^2 and tr Sigma of the distribution below


def batches(b, count, seed=0):
    """Estimates from `count` batches of b gradients of P elements."""
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(count, b, P, generator=generator, dtype=torch.float64) * (TRACE / P) ** 0.5 + (G2 / P) ** 0.5
    return estimate(g.mean(1).square().sum(1), g.square().sum(2).mean(1), b)


def each(estimates):
    return [NoiseEstimate(g, t) for g, t in zip(*estimates, strict=True)]


@pytest.mark.parametrize("b", [2, 3, 16])
def test_estimates_are_unbiased(b):
    found = batches(b, 20_000)
    for value, expected in ((found.gradient_squared, G2), (found.trace, TRACE)):
        assert abs(value.mean() - expected) < 5 * value.std() / 20_000**0.5
    assert NoiseEstimate(torch.tensor(2.0), torch.tensor(6.0)).simple == 3


def test_the_whole_is_the_sum_of_the_parts():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    stats = gradstats.attach(model, "noise_scale")
    model(torch.randn(6, 4)).square().mean().backward()
    total = stats.noise_scale.total
    for i in range(2):
        torch.testing.assert_close(total[i], sum(part[i] for part in stats.noise_scale.values()))


def test_averages_are_separate_and_count_examples():
    """With a horizon far beyond the data both are plain means, weighted by examples."""
    noise, small, large = NoiseScale(1e12), each(batches(2, 5)), each(batches(8, 5, seed=1))
    for some, b in ((small, 2), (large, 8)):
        for one in some:
            noise.add(one, b)
    assert noise.examples == 50
    for i, value in enumerate((noise.gradient_squared, noise.trace)):
        expected = sum(float(e[i]) * 2 for e in small) + sum(float(e[i]) * 8 for e in large)
        assert value == pytest.approx(expected / 50, rel=1e-6)


def test_the_memory_is_a_number_of_examples():
    """After a change the averages move by the same amount in small and in large batches."""
    before, after = (
        NoiseEstimate(torch.tensor(1.0), torch.tensor(4.0)),
        NoiseEstimate(torch.tensor(1.0), torch.tensor(9.0)),
    )
    found = []
    for b in (10, 100):
        noise = NoiseScale(1000)
        for value, examples in ((before, 20_000), (after, 1000)):
            for _ in range(examples // b):
                noise.add(value, b)
        found.append(noise.simple)
    assert found[0] == pytest.approx(found[1]) == pytest.approx(9 - 5 / math.e, rel=1e-3)


@pytest.mark.parametrize("horizon", [1e9, 2000])
def test_the_interval_holds_the_truth_as_often_as_it_says(horizon):
    """90% of 400 intervals, from batches of 16 whose estimates of |G|^2 scatter as much as |G|^2 itself."""
    inside = 0
    for seed in range(400):
        noise = NoiseScale(horizon)
        for one in each(batches(16, 100, seed=seed)):
            noise.add(one, 16)
        low, high = noise.interval(0.9)
        assert low <= noise.simple <= high
        inside += low <= TRACE / G2 <= high
    assert 0.85 < inside / 400 < 0.95


def test_no_bound_where_no_gradient_stands_out():
    noise = NoiseScale(1e9)
    assert noise.interval() == (0, math.inf)
    noise.add(NoiseEstimate(torch.tensor(1.0), torch.tensor(4.0)), 8)
    assert noise.interval() == (0, math.inf)  # one batch has no scatter
    for g in (-1.0, 1.5, -0.7, 0.6):
        noise.add(NoiseEstimate(torch.tensor(g), torch.tensor(4.0 + g)), 8)
    low, high = noise.interval()
    assert 0 < low < noise.simple and high == math.inf
    noise.gradient_squared = -0.1
    assert noise.simple == math.inf and noise.interval()[1] == math.inf


def test_what_is_printed():
    noise = NoiseScale(horizon=1e4)
    assert repr(noise) == "NoiseScale(examples=0, horizon=10000)"
    for estimate_of_batch in each(batches(16, 50)):
        noise.add(estimate_of_batch, 16)
    low, high = noise.interval()
    assert repr(noise).startswith(
        f"NoiseScale(simple={noise.simple:.4g}, 95% in [{low:.4g}, {high:.4g}], examples=800,"
    )


def test_state_dict_continues():
    one, two, some = NoiseScale(500), NoiseScale(500), each(batches(4, 6))
    for value in some[:3]:
        one.add(value, 4)
    two.load_state_dict(one.state_dict())
    for noise in (one, two):
        for value in some[3:]:
            noise.add(value, 4)
    assert one.interval() == two.interval() and one.state_dict() == two.state_dict()
    with pytest.raises(GradstatsError, match="has the state"):
        two.load_state_dict({"trace": 1.0})


def test_windows_that_are_not_gathered_count_with_the_next():
    """And a batch of one example, or of gradients that overflowed, not at all."""
    model = nn.Linear(4, 1)
    found, batches = [], [4, 8, 1, 4, 6]
    torch.manual_seed(0)
    examples = [torch.randn(b, 4) for b in batches]
    for every in (1, 2):
        noise = NoiseScale(1e9)
        with gradstats.attach(model, "noise_scale", every=every) as stats:
            for x in examples:
                model.zero_grad()
                model(x).square().mean().backward()
                noise.update(stats)
        found.append(noise.examples)
    assert found == [4 + 8 + 4 + 6, 4 + (8 + 4 + 6)]
    estimates = []
    with gradstats.attach(model, "noise_scale") as stats:
        for x in (examples[0], examples[4]):
            model.zero_grad()
            model(x).square().mean().backward()
            estimates.append(stats.noise_scale.total)
        before = noise.state_dict()
        model.zero_grad()
        model(examples[0] * math.inf).square().mean().backward()
        noise.update(stats)
    assert noise.state_dict() == before
    expected = (4 * estimates[0].trace + 18 * estimates[1].trace) / 22
    assert noise.trace == pytest.approx(float(expected), rel=1e-6)


def test_refusals():
    with pytest.raises(GradstatsError, match="more than one example"):
        NoiseScale(1)
    with pytest.raises(GradstatsError, match="at least two"):
        estimate(torch.ones(()), torch.ones(()), 1)
