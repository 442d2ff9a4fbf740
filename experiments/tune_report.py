"""What `python -m experiments.tune` says: what was tuned, how much fits, what to type, and what that costs."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from experiments.capacity import Capacity
from experiments.documents import Cell, Table
from experiments.estimate import Array, Estimate, over_seeds
from experiments.optimizers import build_optimizer
from experiments.schemas.optimizer import AdamConfig, BatchInvariantAdamConfig
from experiments.study import default_optimizer
from experiments.tuning import Tuned, Tuner, moved
from gradstats.optim import to_torch
from gradstats.optim.base import ExampleOptimizer

# Options beside these that are not their group's default are told too.
ALWAYS_TOLD = ("name", "label", "lr", "betas", "eps", "batch_size")


def tuning_told(tuned: Tuned[BatchInvariantAdamConfig], tuner: Tuner) -> str:
    seeds, loss = len(tuner.tune.seeds), over_seeds(tuned.losses[tuned.best][:, 0])
    return (
        f"Tuned at B = {tuner.tune.batch_size}: lr {tuned.lr}, where the training loss after "
        f"{tuner.config.train.epochs:g} epochs is lowest: a parabola in ln(loss) through the best learning rate that "
        f"was run, with a loss of {loss}, and its neighbours an octave away. {len(tuner.jobs)} runs, {seeds} seeds of "
        "each; brackets, here and below, are 95% bootstrap intervals over seeds."
    )


def capacity_told(capacity: Capacity, device: torch.device) -> str:
    B = capacity.batch_size
    if capacity.complete:
        limit = "the training set has no larger one"
    elif 2 * B in capacity.peaks:
        limit = f"{2 * B} was tried, and takes more"
    else:
        limit = f"{2 * B} would take more, by a line through what was measured"
    return (
        f"Largest batch: B = {B}. Model, optimizer and a step take {size(capacity.peaks[B])} there, measured on the "
        f"{device.type}, of {size(capacity.budget)} that they may; {limit}. The data is not counted."
    )


def size(count: float) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e8 else f"{count / 1e6:.3g} MB"


def settings(ours: BatchInvariantAdamConfig, batch_size: int, multiple: int, overrides: Sequence[str]) -> list[str]:
    """Code to paste and commands for both optimizers; multiple: evaluation.multiple as the configuration has it."""
    theirs = as_torch(ours, batch_size)
    named = {"lr": f"{ours.lr:g}", "betas": betas(ours), "eps": f"{ours.eps:g}", "batch_size": str(ours.batch_size)}
    code = (
        f"Ours, the same at any batch size:\n\n```python\nstats = gradstats.attach(model)\n"
        f"optimizer = BatchInvariantAdam(model.parameters(), {arguments(named | further(ours))})\n```\n\n"
        f"The closest that torch has at B = {batch_size}:\n\n```python\n"
        f"optimizer = torch.optim.AdamW(model.parameters(), lr={theirs.lr:.4g}, betas={betas(theirs)}, "
        f"eps={theirs.eps:.4g}, weight_decay=0)\n```"
    )
    kept = [text for text in overrides if not text.lstrip("+~").startswith(("tune.", "optimizer", "directory="))]
    kept.append(f"train.batch_size={batch_size}")
    if multiple % batch_size:
        kept.append(f"evaluation.multiple={batch_size}")  # or it would end within a batch
    commands = [
        shlex.join(["python", "-m", "experiments.train", *kept, *as_overrides(optimizer)])
        for optimizer in (ours, theirs)
    ]
    told = [code, "\n".join(["```bash", *commands, "```"])]
    horizon = ours.batch_size / (1 - ours.betas[0])
    if batch_size > horizon:
        told.append(
            f"A batch of {batch_size} is longer than the {horizon:.0f} examples that momentum remembers: it leaves "
            "nothing to average, and the learning curve may leave that of small batches. tune.horizons tries others."
        )
    return told


def as_torch(optimizer: BatchInvariantAdamConfig, batch_size: int) -> AdamConfig:
    """What `to_torch` makes of it at this batch size. Raises GradstatsError for what torch does not have."""
    ours = build_optimizer([torch.zeros(1, requires_grad=True)], optimizer, batch_size, None)
    assert isinstance(ours, ExampleOptimizer)
    group = to_torch(ours, batch_size).param_groups[0]
    adam = default_optimizer("adam")
    assert isinstance(adam, AdamConfig)
    values = {name: group[name] for name in ("lr", "betas", "eps")}
    return moved(dataclasses.replace(adam, **values, batch_size=batch_size), 0)


def further(optimizer: BatchInvariantAdamConfig) -> dict[str, str]:
    """Options that are not the defaults of both the library and the configuration."""
    default = default_optimizer("batch_invariant_adam")
    values = {f.name: getattr(optimizer, f.name) for f in dataclasses.fields(optimizer) if f.name not in ALWAYS_TOLD}
    return {name: repr(value) for name, value in values.items() if value != getattr(default, name)}


def arguments(values: dict[str, str]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())


def as_overrides(optimizer: AdamConfig) -> list[str]:
    values = {
        "lr": f"{optimizer.lr:.4g}",
        "betas": betas(optimizer).replace(" ", "").replace("(", "[").replace(")", "]"),
        "eps": f"{optimizer.eps:.4g}",
        "batch_size": str(optimizer.batch_size),
    }
    if isinstance(optimizer, BatchInvariantAdamConfig):
        R = optimizer.reference_batch_size
        values["reference_batch_size"] = "null" if R is None else f"{R:g}"
    return [f"optimizer={optimizer.name}", *(f"optimizer.{name}={value}" for name, value in values.items())]


def betas(optimizer: AdamConfig) -> str:
    return "(" + ", ".join(f"{beta:.6g}" for beta in optimizer.betas) + ")"


def regret(ours: BatchInvariantAdamConfig, far: int, tuner: Tuner) -> list[str | Table]:
    """Of both optimizers where a batch is larger, against Adam that is tuned there: measured."""
    home = ours.batch_size
    converted = as_torch(ours, far)
    transferred = tuner.losses([ours, converted], far)
    reference = tuner.refine(converted, far)
    table = reference.table()
    names = [f"ours, tuned at B = {home}", f"AdamW, converted to B = {far}"]
    found = [regrets(losses, table) for losses in transferred]
    rows: list[list[Cell]] = [
        [name, f"{lr:.3g}", *means(losses), *regret]
        for name, lr, losses, regret in zip(names, (ours.lr, converted.lr), transferred, found, strict=True)
    ]
    best = reference.best
    rows.append(
        [f"Adam, tuned at B = {far}", f"{converted.lr * 2**best:.3g}", *means(reference.losses[best]), "0", "0"]
    )
    explanation = (
        f"Final losses at B = {far}, measured here over {len(tuner.tune.seeds)} seeds. Regret is to torch's Adam with "
        f"the learning rate, in octaves, of the lowest training loss at B = {far}, chosen again in every resample."
    )
    columns = ["optimizer", "lr", "training loss", "held-out loss", "regret, training", "regret, held-out"]
    sentences = [
        f"Expected regret of {name}, at B = {far}: {training} on the training loss, {held_out} on the held-out loss."
        for name, (training, held_out) in zip(names, found, strict=True)
    ]
    return [Table(f"Regret at B = {far}", explanation, columns, rows, emphasised=(0,)), "\n".join(sentences)]


def means(losses: Array) -> list[Estimate]:
    return [over_seeds(losses[:, i]) for i in (0, 1)]


def regrets(losses: Array, reference: Array) -> list[Estimate]:
    """losses (S, 2) minus those of the reference's (S, L, 2) best lr, on the training and on the held-out loss."""
    rows = np.concatenate([losses[:, None], reference], axis=1)

    def against_best(drawn: Array, loss: int) -> float:
        means = drawn.mean(axis=0)  # (1 + L, 2)
        return float(means[0, loss] - means[1 + int(means[1:, 0].argmin()), loss])

    return [over_seeds(rows, partial(against_best, loss=i)) for i in (0, 1)]
