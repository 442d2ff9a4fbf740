"""Directories of runs as training leaves them, whose losses are known in closed form."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np

from experiments import checkpoint, history, record
from experiments.pages.groups import Collection, group
from experiments.pages.runs import collect
from experiments.record import Record

EXAMPLES = [0, *(256 * 2**i for i in range(8))]
LABELS = {"adam": "Adam, <fixed>", "sgd": "SGD", "forgotten": "?", "batch_invariant_adam": "ours"}
MACHINE = {"processor": "Abacus", "torch": "2.13"}


def loss(method: str, lr: float, batch_size: int, seed: int) -> list[float]:
    """Adam loses by large batches and by learning rates other than 0.01, ours by the latter only."""
    tuned = 1 - 0.1 * abs(np.log2(lr / 0.01))
    slow = 0.05 * np.log2(batch_size) if method == "adam" else 0.0
    rate = 0.5 * tuned - 0.2 * slow + 0.05 * seed
    return [float(np.log(10) * (1 + n / 512) ** -rate) for n in EXAMPLES]


def write_run(
    directory: Path,
    *,
    method: str = "adam",
    lr: float = 0.01,
    batch_size: int = 16,
    seed: int = 0,
    status: Literal["finished", "diverged", "unfinished"] = "finished",
    **more: Any,
) -> Path:
    """more: further keys of the configuration, dotted with double underscores."""
    directory.mkdir(parents=True, exist_ok=True)
    curve = loss(method, lr, batch_size, seed)
    kept = len(curve) if status == "finished" else 5
    config: dict[str, Any] = {
        "name": "synthetic",
        "directory": str(directory),
        "seed": seed,
        "tracker": {"name": "none"},
        "optimizer": {"name": method, "label": LABELS[method], "lr": lr, "batch_size": 16},
        "train": {"batch_size": batch_size, "epochs": 24},
    }
    for key, value in more.items():
        *folders, last = key.split("__")
        inner = config
        for folder in folders:
            inner = inner.setdefault(folder, {})
        inner[last] = value
    (directory / history.CONFIG).write_text(json.dumps(config))
    (directory / history.MACHINE).write_text(json.dumps(MACHINE))
    lines = [
        {
            "examples_seen": n,
            "loss/train": float(f"{value:.6g}"),
            "loss/test": 1.5 * value,
            "accuracy/test": float(np.exp(-value)),
            **({} if n == 0 else {"gradient/noise_scale": 10 + n / 64, "worst_layer/name": "1"}),
            **({} if n == 0 else {f"layers/{i}/signal_to_noise": 0.1 / i - seed / 10 for i in (1, 4)}),
        }
        for n, value in list(zip(EXAMPLES, curve, strict=True))[:kept]
    ]
    (directory / history.FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    if status == "unfinished":
        (directory / checkpoint.FILE).touch()
        return directory
    Record(
        method=method,
        label=LABELS[method],
        lr=lr,
        batch_size=batch_size,
        seed=seed,
        fingerprint="",
        status=status,
        examples=EXAMPLES[:kept],
        train_loss=curve[:kept],
        test_loss=[1.5 * value for value in curve[:kept]],
        test_accuracy=[float(np.exp(-value)) for value in curve[:kept]],
        seconds=2.0,
    ).save(directory / record.FILE)
    return directory


def write_sweep(
    directory: Path,
    methods: Iterable[str] = ("adam", "batch_invariant_adam"),
    rates: Iterable[float] = (0.005, 0.01, 0.02),
    batch_sizes: Iterable[int] = (4, 16, 64),
    seeds: Iterable[int] = (0, 1, 2),
) -> Path:
    """Numbered, as Hydra's sweeps are."""
    for i, (method, lr, batch_size, seed) in enumerate(product(methods, rates, batch_sizes, seeds)):
        write_run(directory / str(i), method=method, lr=lr, batch_size=batch_size, seed=seed)
    return directory


def collected(*paths: Path) -> Collection:
    return group(collect(paths))
