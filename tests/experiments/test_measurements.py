"""The estimates against gradients whose mean and covariance are known."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradstats
from experiments.measurements import BINS, HORIZON, Measurements, histogram

IN, OUT = 3, 2


def regression(n: int, signal: float = 1.0) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(IN, 4), nn.Linear(4, OUT))
    return model, torch.randn(n, IN), signal + torch.randn(n, OUT)


def read(measurements: Measurements, model: nn.Module, x: Tensor, y: Tensor) -> dict[str, object]:
    model.zero_grad()
    F.mse_loss(model(x), y).backward()
    return measurements.read(len(x))


def test_noise_scale_and_worst_layer_match_the_per_example_gradients() -> None:
    model, x, y = regression(8)
    per_example = gradstats.per_example_gradients(model, F.mse_loss, x, y)
    with gradstats.attach(model) as statistics:
        values = read(Measurements(model, statistics, detail=False), model, x, y)
    layers = {}
    for layer in ("0", "1"):
        g = torch.cat([per_example[f"{layer}.{kind}"].flatten(1) for kind in ("weight", "bias")], 1)  # (B, layer)
        covariance = g.var(0, correction=1).sum().item()
        layers[layer] = g.mean(0).square().sum().item() - covariance / 8, covariance
    norm, covariance = (sum(column) for column in zip(*layers.values(), strict=True))
    ratios = {layer: a / b for layer, (a, b) in layers.items()}
    assert values["gradient/noise_scale"] == pytest.approx(covariance / norm, rel=1e-4)
    assert values["worst_layer/name"] == min(ratios, key=ratios.__getitem__)
    assert values["worst_layer/signal_to_noise"] == pytest.approx(min(ratios.values()), rel=1e-4)
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert values["gradient/norm"] == pytest.approx(gradient.norm().item(), rel=1e-5)


def test_estimates_are_averaged_before_they_are_divided() -> None:
    model, x, y = regression(8 * HORIZON)
    with gradstats.attach(model) as statistics:
        measurements = Measurements(model, statistics, detail=False)
        single = []
        for batch in zip(x.split(8), y.split(8), strict=True):
            values = read(measurements, model, *batch)
            alone = Measurements(model, statistics, detail=False)
            alone.read(8)
            single.append((sum(alone.squared_norm), sum(alone.covariance)))
    norm, covariance = (sum(column) / HORIZON for column in zip(*single, strict=True))
    assert values["gradient/noise_scale"] == pytest.approx(covariance / norm, rel=1e-6)


def test_one_example_has_no_noise_scale_and_a_plain_model_only_a_norm() -> None:
    model, x, y = regression(1)
    assert set(read(Measurements(model, None, detail=False), model, x, y)) == {"gradient/norm"}
    with gradstats.attach(model) as statistics:
        assert set(read(Measurements(model, statistics, detail=False), model, x, y)) == {"gradient/norm"}


def test_detail_adds_panels_of_layers_and_histograms_of_norms() -> None:
    model, x, y = regression(16)
    with gradstats.attach(model, "second_moment", "norms") as statistics:
        values = read(Measurements(model, statistics, detail=True), model, x, y)
        total = statistics.norms.total
    assert {f"layers/{layer}/gradient_norm" for layer in "01"} < set(values)
    assert {"norms/0.weight", "norms/1.bias", "norms/whole gradient"} < set(values)
    whole = values["norms/whole gradient"]
    assert sum(whole.counts) == 16 and len(whole.counts) == BINS
    assert (whole.edges[0], whole.edges[-1]) == pytest.approx((total.min().item(), total.max().item()))


def test_histogram_of_equal_values() -> None:
    result = histogram(torch.full((5,), 3.0))
    assert sum(result.counts) == 5 and result.edges[0] == 2.5 and result.edges[-1] == 3.5


def test_state_round_trip() -> None:
    model, x, y = regression(8)
    with gradstats.attach(model) as statistics:
        first = Measurements(model, statistics, detail=False)
        read(first, model, x, y)
        second = Measurements(model, statistics, detail=False)
        second.load_state_dict(first.state_dict())
        assert first.read(8) == second.read(8)
