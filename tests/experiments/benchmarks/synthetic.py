"""A run as it might have been measured."""

from __future__ import annotations

from typing import Any

from experiments.benchmarks.contestants import CONTESTANTS
from experiments.benchmarks.report import Run
from experiments.benchmarks.results import Row
from experiments.benchmarks.scaling import Growth

ABOUT = {"device": "cpu", "dtype": "float32", "threads": 2, "processor": "abacus", "quick": False}
ABOUT |= {"steps": 20, "seconds": 2.5, "code": "0", "torch": "2"}


def made(contestant: str, ratio: float | None = None, **changes: Any) -> Row:
    one = CONTESTANTS[contestant]
    told: dict[str, Any] = {"workload": "mlp", "contestant": contestant, "title": one.title, "statistic": one.statistic}
    if ratio is not None:
        told |= {"plain_ms": 10.0, "ms": 10 * ratio, "lower": ratio - 0.1, "ratio": ratio, "upper": ratio + 0.1}
        told |= {"pairs": 20, "peak": 2**20, "above": 1.04, "statistic_error": 2e-7}
    return Row(**(told | changes))


def run(**about: Any) -> Run:
    rows = [
        made("plain", 1.0, above=0.0, statistic_error=0.0),
        made("ours-second_moment", 1.5),
        made("ours-norms", 1.125, above=0.0),
        made("ours-all", 1.6),
        made("ours-microbatch", 1.01),
        made("backpack-second_moment", 1.4, error="wrong: 3.0% off"),
        made("opacus-second_moment", 120.4),
        made("func-whole", 9.5),
        made("microbatches", 1.02),
        made("opacus-ghost", error="not installed"),
    ]
    growth = Growth(
        "scale_batch", "MLP", "B", "ours-norms", "norms", [1, 4], [1.0, 2.0], [2.0, 8.0], [2.0, 4.0], 0.5, 1.0
    )
    return Run("2026-01-01", ABOUT | about, rows, [growth])
