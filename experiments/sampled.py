"""What statistics of a part of what is seen cost in learning: final losses at every=k and fraction=f.

python -m experiments.sampled                                   minutes; prints the table, writes outputs/sampled.json
python -m experiments.sampled --document docs/optimizers.md     writes it into a document too

The digits, at a batch size above that of tuning, so that the second moment at R is read from the statistics.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import joblib
import torch
import torch.nn.functional as F
from rich.console import Console

import gradstats
from experiments.benchmarks.machine import machine, save
from experiments.config import compose_config
from experiments.data import load_data
from experiments.documents import Table, fill_document, markdown
from experiments.errors import command_line
from experiments.models import build_model
from experiments.optimizers import build_optimizer
from experiments.sampler import Sampler
from experiments.train import evaluate, prepare

WIDTH = 120  # of the table
PARTS = ((1, 1.0), (4, 1.0), (8, 1.0), (16, 1.0), (1, 1 / 4), (1, 1 / 16), (8, 1 / 4))
OPTIMIZERS = {"R = B0": "batch_invariant_adam", "R = 1": "batch_invariant_adam_r1"}


@dataclass(frozen=True)
class Run:
    """Losses are those of the whole sets, after the last step."""

    optimizer: str
    every: int
    fraction: float
    batch_size: int
    seed: int
    train_loss: float
    test_loss: float


def run(label: str, every: int, fraction: float, batch_size: int, seed: int, epochs: float) -> Run:
    config = compose_config([f"optimizer={OPTIMIZERS[label]}", "tracker=none", "directory=none"])
    device = prepare(config)
    data = load_data(config.data, device)
    torch.manual_seed(seed)
    model = build_model(config.model, data.shape, data.classes).to(device)
    optimizer = build_optimizer(list(model.parameters()), config.optimizer, batch_size, None)
    # Parts are drawn by a generator of their own: all runs of a seed share examples and dropout masks.
    generator = torch.Generator().manual_seed(seed) if fraction < 1 else None
    gradstats.attach(model, every=every, fraction=fraction, generator=generator)
    sampler = Sampler(len(data.train), batch_size, seed, device)
    for indices in sampler.until(math.ceil(epochs * len(data.train) / batch_size) * batch_size):
        optimizer.zero_grad()
        F.cross_entropy(model(data.train.x[indices]), data.train.y[indices]).backward()
        optimizer.step()
    losses = [evaluate(model, split, nullcontext())[0] for split in (data.train, data.test)]
    return Run(label, every, fraction, batch_size, seed, *losses)


def table(runs: Sequence[Run], epochs: float) -> Table:
    """Mean and standard deviation over seeds, and the mean difference to all of the statistics, seed by seed."""
    labels = list(dict.fromkeys(r.optimizer for r in runs))
    losses = {(r.optimizer, r.every, r.fraction, r.seed): r.train_loss for r in runs}
    seeds = sorted({r.seed for r in runs})
    rows: list[list[str]] = []
    for every, fraction in dict.fromkeys((r.every, r.fraction) for r in runs):
        row = [title(every, fraction)]
        for label in labels:
            own = [losses[label, every, fraction, seed] for seed in seeds]
            change = [a - losses[label, 1, 1.0, seed] for a, seed in zip(own, seeds, strict=True)]
            row += [
                f"{statistics.mean(own):.4f} ± {spread(own):.4f}",
                f"{statistics.mean(change):+.4f} ± {spread(change):.4f}",
            ]
        rows.append(row)
    columns = ["statistics", *(f"{label}{what}" for label in labels for what in ("", ", difference"))]
    about = (
        f"Final training loss on the digits after {epochs:g} epochs at B = {runs[0].batch_size}, tuned at B0 = 16; "
        f"mean and standard deviation over {len(seeds)} seeds, which share examples and dropout masks."
    )
    return Table("What a part of the statistics costs in learning", about, columns, [list(row) for row in rows], (0,))


def title(every: int, fraction: float) -> str:
    parts = [f"every={every}"] * (every > 1) + [f"fraction=1/{round(1 / fraction)}"] * (fraction < 1)
    return ", ".join(parts) or "all"


def spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=float, default=24.0)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--workers", type=int, default=1, help="processes, one thread each")
    parser.add_argument("--output", type=Path, default=Path("outputs/sampled.json"))
    parser.add_argument("--document", type=Path, help="a file to write the table into, between its markers")
    arguments = parser.parse_args()
    with command_line("interrupted: nothing was written"):
        cells = product(OPTIMIZERS, PARTS, arguments.seeds)
        jobs = (
            joblib.delayed(run)(label, *part, arguments.batch_size, seed, arguments.epochs)
            for label, part, seed in cells
        )
        runs = joblib.Parallel(arguments.workers, batch_size=1)(jobs)
        written = table(runs, arguments.epochs)
        Console(width=WIDTH).print(written.rich())
        save(arguments.output, 1, runs)
        if arguments.document is not None:
            about = ", ".join(f"{key} {value}" for key, value in machine(1).items())
            fill_document(arguments.document, "sampled", f"{markdown(written)}\n\n{about}.")


if __name__ == "__main__":
    # By its importable name: processes of workers could not import from __main__.
    from experiments import sampled as importable

    importable.main()
