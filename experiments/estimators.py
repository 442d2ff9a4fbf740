"""Which estimator of the second moment at a reference batch size R is best where R is above the batch size?

python -m experiments.estimators                     some minutes on a core; writes outputs/estimators
python -m experiments.estimators --epochs 24 --seeds 0 1 2 3 4 --workers 2

Two measurements, of R > B or B = 1 only, since elsewhere one batch is enough and the estimators coincide:

    error       of ln s at fixed parameters, where the truth is known (experiments.estimation_error), on the digits
    training    final training loss at each estimator's tuned learning rate, runs that diverged, and score over B, on
                every task: the mean gradient of a network that sees digits stays, and that of one that learns to
                read turns, so that an estimator may lag behind it

How the winner is found: experiments.estimator_verdict. A command that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import joblib
import torch
from rich.console import Console

from experiments import record
from experiments.benchmarks.machine import machine
from experiments.config import compose_config
from experiments.data import load_data
from experiments.documents import fill_document, markdown
from experiments.errors import Diverged, command_line
from experiments.estimation_error import Error, coincide, errors, population
from experiments.estimator_verdict import Training, Verdict, judge, name_of, tables
from experiments.fingerprint import fingerprint
from experiments.grid import Grid, arrange
from experiments.invariance.analysis import spread
from experiments.models import build_model
from experiments.record import Record
from experiments.schemas.optimizer import BatchInvariantAdamConfig
from experiments.schemas.run import Config
from experiments.train import train
from gradstats.optim.moment import ESTIMATORS

# What a task overrides, and the share of its epochs: a pass over the texts is as dear as six over the digits.
TASKS: dict[str, tuple[list[str], float]] = {
    "digits": ([], 1.0),
    "topics": (["data=topics", "model=gpt", "data.evaluated=512"], 1 / 6),
}
REFERENCES = (4.0, 16.0, 64.0, math.inf)
TUNED = 16  # the batch size of tuning
WARMUP = 1024  # examples; the usual one would be half of the short form
MULTIPLIERS = (0.25, 0.5, 1.0, 2.0, 4.0)
# Noise dominates, so that lr goes with the root of 1/R; it cannot for ever.
LARGEST = 256
COUNTS = (1024, 8192)
TRAINED_EPOCHS = 2
WIDTH = 120  # of the widest table


@dataclass(frozen=True)
class Study:
    epochs: float
    batch_sizes: tuple[int, ...]
    seeds: tuple[int, ...]
    workers: int
    directory: Path

    def run(self, task: str, r: float, estimator: str, multiplier: float, batch_size: int, seed: int) -> Config:
        """Where the estimators coincide they share their run."""
        alone = batch_size == 1 and estimator == "in_batch"  # then it is the first one
        shared = ESTIMATORS[0] if alone or coincide(r, batch_size) else estimator
        base, adam = tuned(task)
        lr = adam.lr * multiplier * math.sqrt(TUNED / min(r, LARGEST))
        config = dataclasses.replace(
            base,
            seed=seed,
            optimizer=dataclasses.replace(adam, lr=lr, reference_batch_size=r, estimator=shared),
            train=dataclasses.replace(base.train, epochs=self.epochs * TASKS[task][1], batch_size=batch_size),
        )
        return dataclasses.replace(config, directory=str(self.directory / "runs" / fingerprint(config)))

    def records(self, task: str, cells: Sequence[tuple[float, str, float, int, int]]) -> list[Record]:
        """Of every cell (R, estimator, multiplier, B, seed), from what is on disk and from new runs."""
        configs = [self.run(task, *cell) for cell in cells]
        todo = {config.directory: config for config in configs if not finished(config)}
        longest_first = sorted(todo.values(), key=lambda config: config.train.batch_size)
        workers = joblib.Parallel(self.workers, batch_size=1)
        workers(joblib.delayed(run_one)(config) for config in longest_first)
        return [
            dataclasses.replace(Record.load(Path(config.directory) / record.FILE), method=name_of(r, estimator))
            for config, (r, estimator, *_) in zip(configs, cells, strict=True)
        ]


@functools.cache
def tuned(task: str) -> tuple[Config, BatchInvariantAdamConfig]:
    """What all runs on the task have in common."""
    overrides = ["tracker=none", "resume=true", f"train.warmup_examples={WARMUP}", "directory=unknown"]
    config = compose_config([*overrides, f"optimizer.batch_size={TUNED}", *TASKS[task][0]])
    assert isinstance(config.optimizer, BatchInvariantAdamConfig)
    return config, config.optimizer


def finished(config: Config) -> bool:
    return (Path(config.directory) / record.FILE).exists()


def run_one(config: Config) -> None:
    with suppress(Diverged):  # its record says so
        train(config, Path(config.directory))


def tune_and_train(study: Study, task: str) -> Training:
    methods = tuple(product(REFERENCES, ESTIMATORS))
    cells = [(*m, x, TUNED, s) for m in methods for x in MULTIPLIERS for s in study.seeds]
    tuning = arrange(study.records(task, cells))
    best = tuning.train_loss[:, :, 0, :, -1].mean(axis=-1).argmin(axis=1)  # (M,)
    cells = [
        (*m, MULTIPLIERS[i], b, s)
        for (m, i) in zip(methods, best, strict=True)
        for b in study.batch_sizes
        for s in study.seeds
    ]
    grid: Grid = arrange(study.records(task, cells))
    return Training(
        task,
        methods,
        study.batch_sizes,
        TUNED,
        grid.lr[:, 0],
        grid.train_loss[:, 0, ..., -1],
        grid.diverged[:, 0],
        spread(grid.train_loss[:, 0][..., grid.late], axis=1),
    )


def measure_errors(study: Study) -> list[Error]:
    """On the digits, at the initial parameters, and at trained ones."""
    config, adam = tuned("digits")
    data = load_data(config.data, torch.device("cpu"))
    x, y = data.train.x, data.train.y
    torch.manual_seed(0)
    model = build_model(config.model, data.shape, data.classes).eval()
    populations = [population("initial", model, x, y)]
    optimizer = torch.optim.Adam(model.parameters(), lr=adam.lr)
    for _ in range(TRAINED_EPOCHS):
        for indices in torch.randperm(len(x)).split(TUNED):
            model.zero_grad()
            torch.nn.functional.cross_entropy(model(x[indices]), y[indices]).backward()
            optimizer.step()
    populations.append(population("trained", model, x, y))
    found = []
    for p, b in product(populations, study.batch_sizes):
        found += errors(p, b, REFERENCES, COUNTS, len(study.seeds), adam.betas, TUNED)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=float, default=6.0, help="over the digits; other tasks have as many steps")
    parser.add_argument("--tasks", nargs="+", choices=[*TASKS], default=[*TASKS])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=1, help="processes, one thread each")
    parser.add_argument("--directory", type=Path, default=Path("outputs/estimators"))
    parser.add_argument("--document", type=Path, help="a file to write the tables into, between its markers")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    document = arguments.document
    study = Study(
        arguments.epochs,
        tuple(arguments.batch_sizes),
        tuple(arguments.seeds),
        arguments.workers,
        arguments.directory,
    )
    with command_line("interrupted: the same command continues"):
        found = measure_errors(study)
        training = [tune_and_train(study, task) for task in arguments.tasks]
        verdicts = judge(training, found)
        written = tables(training, found, verdicts)
        for table in written:
            Console(width=WIDTH).print(table.rich())
        save(study, training, found, verdicts)
        text = "\n\n".join([*map(markdown, written), told(study, arguments.tasks)])
        (study.directory / "tables.md").write_text(text + "\n", encoding="utf-8")
        if document is not None:
            fill_document(document, "estimators", text)
        print(f"winner: {verdicts[0].estimator}; written: {study.directory}")


def told(study: Study, tasks: Sequence[str]) -> str:
    about = ", ".join(f"{key} {value}" for key, value in machine(1).items())
    epochs = ", ".join(f"{task} {study.epochs * TASKS[task][1]:g} epochs" for task in tasks)
    return f"{epochs}; {len(study.seeds)} seeds; {about}."


def save(study: Study, trainings: Sequence[Training], found: Sequence[Error], verdicts: Sequence[Verdict]) -> None:
    written = {
        "machine": machine(1),
        "epochs": study.epochs,
        "seeds": study.seeds,
        "verdicts": [asdict(v) for v in verdicts],
        "training": [
            {
                "task": training.task,
                "R": r,
                "estimator": estimator,
                "lr": training.lr[m],
                "loss": dict(zip(map(str, training.batch_sizes), training.loss[m].tolist(), strict=True)),
                "diverged": dict(zip(map(str, training.batch_sizes), training.diverged[m].tolist(), strict=True)),
                "score": training.score[m].tolist(),
            }
            for training in trainings
            for m, (r, estimator) in enumerate(training.methods)
        ],
        "errors": [asdict(e) for e in found],
    }
    (study.directory / "estimators.json").write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    # By its importable name: processes of workers could not import from __main__.
    from experiments import estimators as importable

    importable.main()
