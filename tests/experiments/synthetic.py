"""Records of an imaginary study, whose losses are known in closed form."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np

from experiments.description import Description, Place, environment
from experiments.invariance.analysis import Comparison
from experiments.laboratory.schemas import BatchSizeInvarianceConfig
from experiments.record import FILE, Record

BATCH_SIZES = (1, 4, 16, 64, 256)
EXAMPLES = [0, *np.unique(np.geomspace(1, 128, 20).astype(int) * 256).tolist()]
COMPARISON = Comparison(
    ours=("ours", "ours_r1"), reference="adam", tuning_batch_size=16, score_batch_sizes=(1, 4, 16, 64)
)
# How much a method's loss moves with ln(batch size / 16): zero is invariance.
SENSITIVITY = {"ours": 0.01, "ours_r1": 0.015, "adam": 0.5, "square_root": 0.12, "sgd": 0.03}
SLOWNESS = {"sgd": 0.6}


def record(method: str, batch_size: int, train_loss: list[float], *, lr: float = 1e-3, seed: int = 0) -> Record:
    counts = [256 * i for i in range(len(train_loss))]
    return Record(
        method=method,
        label=method,
        lr=lr,
        batch_size=batch_size,
        seed=seed,
        fingerprint=f"{method}-{batch_size}-{lr}-{seed}",
        status="finished",
        examples=counts,
        train_loss=train_loss,
        test_loss=[1.5 * loss for loss in train_loss],
        test_accuracy=[float(np.exp(-loss)) for loss in train_loss],
    )


def study(*, seeds: int = 3, batch_sizes: tuple[int, ...] = BATCH_SIZES) -> list[Record]:
    """Power-law curves ln 10 (1 + n / 512)^-rate, times the method's response to the batch size."""
    records = []
    for method, sensitivity in SENSITIVITY.items():
        for multiplier in (0.125, 0.25, 0.5, 1.0, 2.0):
            rate = 1.1 * (1 - 0.08 * np.log2(multiplier) ** 2) * SLOWNESS.get(method, 1.0)
            for batch_size in batch_sizes:
                for seed in range(seeds):
                    random = np.random.default_rng([seed, len(method)])
                    noise = 0.01 * random.normal(size=len(EXAMPLES))
                    steps = sensitivity * np.log(batch_size / 16) * multiplier
                    curve = [
                        float(np.log(10) * (1 + n / 512) ** -rate * np.exp(min(n / 4096, 1) * (abs(steps) + e)))
                        for n, e in zip(EXAMPLES, noise, strict=True)
                    ]
                    result = record(method, batch_size, curve, lr=1e-3 * multiplier, seed=seed)
                    result.label = method.replace("_", " ").capitalize()
                    result.examples = EXAMPLES
                    records.append(result)
    return records


def write(directory: Path, records: list[Record]) -> Path:
    """The directory of a study as it is when all runs are done, before the report is made."""
    jobs = []
    for i, result in enumerate(records):
        jobs.append(Place(f"runs/{i}", {"method": result.method, "seed": result.seed}))
        (directory / jobs[-1].directory).mkdir(parents=True)
        result.save(directory / jobs[-1].directory / FILE)
    methods = list(dict.fromkeys(result.method for result in records))
    settings = BatchSizeInvarianceConfig(
        name="batch_size_invariance",
        note="A short version.",
        seeds=sorted({result.seed for result in records}),
        ours=list(COMPARISON.ours),
        baselines=[method for method in methods if method not in COMPARISON.ours],
        reference=COMPARISON.reference,
        tuning_batch_size=COMPARISON.tuning_batch_size,
        lr_multipliers=[1.0],
        batch_sizes=list(BATCH_SIZES),
        score_batch_sizes=list(COMPARISON.score_batch_sizes),
    )
    Description(
        config={"name": "synthetic", "study": asdict(settings)},
        jobs=jobs,
        command="python -m experiments.train experiment=demo 'data.path=a b'",
        environment=environment(threads=1),
    ).save(directory)
    return directory
