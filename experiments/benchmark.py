"""The price of the statistics: forward and backward with them, as a ratio to the plain step, in one process.

python -m experiments.benchmark                     all workloads, prints the table and writes outputs/benchmark.json
python -m experiments.benchmark --steps 50 mlp      one workload, more steps

Contestants alternate step by step, so that a change of the machine's speed meets all of them alike; a ratio is taken
pair by pair, and its median and quartiles are shown.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import gradstats
from experiments.gpt import GPT


@dataclass(frozen=True)
class Workload:
    model: Callable[[], nn.Module]
    batch: Callable[[], tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor]


def images() -> tuple[Tensor, Tensor]:
    return torch.randn(256, 784), torch.randint(0, 10, (256,))


def text() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, 256, (16, 129))
    return tokens[:, :-1], tokens[:, 1:]


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))


WORKLOADS = {
    "mlp": Workload(perceptron, images, F.cross_entropy),
    "gpt": Workload(
        lambda: GPT(words=256, width=256, layers=4, heads=4, positions=128),
        text,
        lambda logits, y: F.cross_entropy(logits.flatten(0, 1), y.flatten()),
    ),
}
STATISTICS = {"second_moment": ("second_moment",), "norms": ("norms",), "both": ("second_moment", "norms")}


@dataclass(frozen=True)
class Measurement:
    """Milliseconds are medians; `ratio` is the median over pairs of steps, between its quartiles."""

    workload: str
    statistics: str
    plain_ms: float
    attached_ms: float
    lower: float
    ratio: float
    upper: float
    steps: int


def measure(name: str, steps: int, warmup: int = 3) -> list[Measurement]:
    torch.manual_seed(0)
    workload = WORKLOADS[name]
    plain = workload.model()
    models = {"plain": plain}
    for contestant, names in STATISTICS.items():
        models[contestant] = copy.deepcopy(plain)
        gradstats.attach(models[contestant], *names)
    x, y = workload.batch()
    seconds: dict[str, list[float]] = {contestant: [] for contestant in models}
    for i in track(range(warmup + steps), f"{name}: {steps} steps of {len(models)} contestants", transient=True):
        for contestant, model in models.items():
            start = time.perf_counter()
            workload.loss(model(x), y).backward()
            elapsed = time.perf_counter() - start
            model.zero_grad()
            if i >= warmup:
                seconds[contestant].append(elapsed)
    found = []
    for contestant in STATISTICS:
        lower, middle, upper = ratio(seconds[contestant], seconds["plain"])
        plain_ms, attached_ms = (1e3 * statistics.median(seconds[c]) for c in ("plain", contestant))
        found.append(Measurement(name, contestant, plain_ms, attached_ms, lower, middle, upper, steps))
    return found


def ratio(seconds: list[float], baseline: list[float]) -> list[float]:
    """Lower quartile, median and upper quartile of the ratios, pair by pair."""
    return statistics.quantiles([a / b for a, b in zip(seconds, baseline, strict=True)], n=4, method="inclusive")


def machine(threads: int) -> dict[str, Any]:
    return {
        "processor": platform.processor() or platform.machine(),
        "threads": threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gradstats": gradstats.__version__,
    }


def save(output: Path, threads: int, results: Sequence[Any]) -> None:
    """Results, which are dataclasses, and the machine that they were measured on."""
    output.parent.mkdir(parents=True, exist_ok=True)
    written = {"machine": machine(threads), "results": [asdict(result) for result in results]}
    output.write_text(json.dumps(written, indent=2) + "\n")
    print(f"written: {output}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", nargs="?", choices=[*WORKLOADS, "all"], default="all")
    parser.add_argument("--steps", type=int, default=20, help="measured steps of each contestant")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of torch")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmark.json"))
    arguments = parser.parse_args()
    if arguments.steps < 2:
        parser.error("--steps: quartiles need at least 2")
    torch.set_num_threads(arguments.threads)
    names = WORKLOADS if arguments.workload == "all" else [arguments.workload]
    found = [m for name in names for m in measure(name, arguments.steps)]

    table = Table("workload", "statistics", "plain ms", "attached ms", "ratio", "quartiles")
    for m in found:
        row = (f"{m.plain_ms:.1f}", f"{m.attached_ms:.1f}", f"{m.ratio:.2f}", f"{m.lower:.2f} to {m.upper:.2f}")
        table.add_row(m.workload, m.statistics, *row)
    Console().print(table)
    save(arguments.output, arguments.threads, found)


if __name__ == "__main__":
    main()
