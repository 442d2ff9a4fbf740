"""What is read from gradients and per-example statistics at a logging point, between backward and step.

The simple noise scale is made of two estimates (gradstats.noise_scale), |G|^2 and tr Sigma; each is averaged over time
first, since a ratio of noisy numbers is biased. B = 1 has neither. Here they are of layers, and all of them are brought
to the host at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from experiments.tracker import Histogram, Value
from gradstats import Handle
from gradstats.noise_scale import estimate

# Logging points over which the estimates are averaged; a plain mean over the first ones.
HORIZON = 10
BINS = 32


class Measurements:
    def __init__(self, model: nn.Module, statistics: Handle | None, detail: bool) -> None:
        self.parameters = dict(model.named_parameters())
        # Micro-batches have another noise, and an optimizer may gather less than it takes.
        usable = statistics and statistics.granularity == "example" and "second_moment" in statistics.statistics
        self.statistics = statistics if usable else None
        self.detail = detail
        # A layer is what owns parameters: weight and bias are one.
        self.layers = list(dict.fromkeys(name.rpartition(".")[0] for name in self.parameters))
        self.points = 0
        self.squared_norm = [0.0] * len(self.layers)  # of the true gradient, by layer
        self.covariance = [0.0] * len(self.layers)  # its trace, by layer

    def read(self, batch_size: int) -> dict[str, Value]:
        """Waits for the device once, or twice with histograms."""
        gradients = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        squares = self._by_layer({name: gradient.float().square().sum() for name, gradient in gradients.items()})
        if self.statistics is None or not self.statistics.gathered:
            return {"gradient/norm": squares.sum().sqrt().item()}
        moments = self._by_layer({name: q.sum() for name, q in self.statistics.second_moment.items()})
        values: dict[str, Value] = {}
        batch, per_example = torch.stack([squares, moments]).tolist()
        values["gradient/norm"] = sum(batch) ** 0.5
        if batch_size > 1:
            self._average(batch, per_example, batch_size)
            values |= self._noise()
        if self.detail:
            values |= {
                f"layers/{layer}/gradient_norm": square**0.5 for layer, square in zip(self.layers, batch, strict=True)
            }
            values |= self._histograms(self.statistics)
        return values

    def _by_layer(self, scalars: dict[str, Tensor]) -> Tensor:
        """Sums over the parameters of each layer, (layers,); a parameter that is absent counts as zero."""
        device = next(iter(self.parameters.values())).device
        sums = torch.zeros(len(self.layers), device=device)
        owners = torch.tensor([self.layers.index(name.rpartition(".")[0]) for name in scalars], device=device)
        return sums.index_add(0, owners, torch.stack(list(scalars.values())).float())

    def _average(self, batch: list[float], per_example: list[float], batch_size: int) -> None:
        self.points += 1
        weight = 1 / min(self.points, HORIZON)
        found = estimate(torch.tensor(batch), torch.tensor(per_example), batch_size)
        for i, (squared_norm, trace) in enumerate(zip(*(part.tolist() for part in found), strict=True)):
            self.squared_norm[i] += weight * (squared_norm - self.squared_norm[i])
            self.covariance[i] += weight * (trace - self.covariance[i])

    def _noise(self) -> dict[str, Value]:
        values: dict[str, Value] = {}
        # Near a minimum the estimate of the squared norm can be negative, and then there is no scale to report.
        if (total := sum(self.squared_norm)) > 0:
            values["gradient/noise_scale"] = sum(self.covariance) / total
        ratios = {
            layer: norm / trace
            for layer, norm, trace in zip(self.layers, self.squared_norm, self.covariance, strict=True)
            if trace > 0
        }
        if ratios:
            worst = min(ratios, key=ratios.__getitem__)
            values |= {"worst_layer/name": worst, "worst_layer/signal_to_noise": ratios[worst]}
        if self.detail:
            values |= {f"layers/{layer}/signal_to_noise": ratio for layer, ratio in ratios.items()}
        return values

    def _histograms(self, statistics: Handle) -> dict[str, Value]:
        norms = {"whole gradient": statistics.norms.total, **statistics.norms}
        return {f"norms/{name}": histogram(values) for name, values in norms.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"points": self.points, "squared_norm": self.squared_norm, "covariance": self.covariance}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.points, self.squared_norm, self.covariance = (state["points"], state["squared_norm"], state["covariance"])


def histogram(values: Tensor) -> Histogram:
    """Counted on the device: only the range and the bins come to the host."""
    values = values.detach().float()
    low, high = torch.stack(torch.aminmax(values)).tolist()
    if low == high:  # histc would take a range of its own
        low, high = low - 0.5, high + 0.5
    counts = torch.histc(values, BINS, low, high).tolist()
    return Histogram(counts, torch.linspace(low, high, BINS + 1).tolist())
