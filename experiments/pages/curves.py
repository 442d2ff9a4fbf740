"""Curves of a group against examples seen: the mean over its seeds, and the band from the lowest to the highest."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from experiments.estimate import Array
from experiments.pages.groups import Group

# More would only make the page heavy: a chart is at most 900 pixels wide.
POINTS = 160

METRICS = {
    "loss/train": "training loss (nats)",
    "loss/test": "test loss (nats)",
    "accuracy/test": "test accuracy",
    "accuracy/train": "training accuracy",
    "loss/batch": "loss of the batches between logging points (nats)",
    "gradient/noise_scale": "gradient noise scale (examples)",
    "gradient/norm": "norm of the batch gradient",
    "worst_layer/signal_to_noise": "signal-to-noise of the worst layer",
    "optimizer/lr": "learning rate",
    "speed/examples_per_second": "examples a second",
}


@dataclass(frozen=True)
class Curve:
    examples: Array  # (T,)
    mean: Array  # (T,)
    low: Array  # (T,)
    high: Array  # (T,)


def curve(group: Group, metric: str) -> Curve | None:
    """Up to where the first of the seeds ends, so that no mean is of those only that did not break; None if empty.

    A seed that has no value at a count, as of a noise scale that cannot be estimated, is left out there.
    """
    series = [run.series.get(metric, {}) for run in group.runs]
    reach = min(run.reach for run in group.runs)
    counts = sorted({count for values in series for count in values if count <= reach})
    if not counts:
        return None
    counts = [counts[i] for i in np.unique(np.linspace(0, len(counts) - 1, POINTS).round().astype(int))]
    rows = [[values[count] for values in series if count in values] for count in counts]
    return Curve(
        np.array(counts, dtype=float),
        np.array([np.mean(row) for row in rows]),
        np.array([min(row) for row in rows]),
        np.array([max(row) for row in rows]),
    )


def metrics(groups: Iterable[Group]) -> list[str]:
    """The scalars of the whole model that were logged, those of METRICS first."""
    logged = {name for group in groups for run in group.runs for name in run.series if not name.startswith("layers/")}
    return [name for name in METRICS if name in logged] + sorted(logged - METRICS.keys())


def layers(group: Group) -> list[str]:
    """Names of the layers whose signal-to-noise was logged, in the order of the model."""
    logged = dict.fromkeys(name for run in group.runs for name in run.series)
    return [name.split("/")[1] for name in logged if name.startswith("layers/") and name.endswith("/signal_to_noise")]
