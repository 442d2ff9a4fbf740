"""The hardest examples: those with the longest gradients, which a model has not learnt, or whose label is wrong."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradstats
from experiments.data import Dataset, Split
from experiments.tracker import Cell, Picture, Tracker

COUNT = 32
# A picture has one target, and a sequence as many as it is long.
CHUNK_TARGETS = 8192  # whose norms are taken at once
CHUNK = 256  # examples at once, at most
MOST_TARGETS = 2**20  # that are looked at, evenly over the set: more would take as long as an epoch
SHORTEST_SIDE = 64  # pixels: W&B shows a picture at its own size, and one of the digits has 8

COLUMNS = ("rank", "index", "picture", "label", "predicted", "loss", "gradient norm")


@dataclass(frozen=True)
class Hardness:
    """Of the examples with these indices."""

    index: Tensor  # (N,)
    norm: Tensor  # (N,) ||g_n|| of the whole gradient
    loss: Tensor  # (N,) nats, the mean over targets
    predicted: Tensor  # (N,) or (N, T) class


def show_hardest(model: nn.Module, data: Dataset, tracker: Tracker) -> None:
    """A table of the training examples with the longest gradients at the present parameters. A failure is told on
    stderr: nothing here stops a run, whose record is written already."""
    try:
        tracker.table("hardest examples", COLUMNS, hardest(model, data))
    except Exception as error:  # the run is over, and a table is all that is lost
        print(f"the hardest examples could not be found: {error}", file=sys.stderr)


def hardest(model: nn.Module, data: Dataset, count: int = COUNT) -> list[list[Cell]]:
    """Rows for COLUMNS, the longest gradient first. Raises GradstatsError for a model without per-example gradients."""
    found = hardness(model, data.train)
    order = found.norm.argsort(descending=True, stable=True)[:count]
    return [
        [
            rank,
            index := int(found.index[i]),
            depict(data.train.x[index], data.vocabulary),
            spell(data.train.y[index], data.vocabulary),
            spell(found.predicted[i], data.vocabulary),
            float(found.loss[i]),
            float(found.norm[i]),
        ]
        for rank, i in enumerate(order.tolist(), start=1)
    ]


def hardness(model: nn.Module, split: Split) -> Hardness:
    """In evaluation mode, at the present parameters, in float32."""
    N, targets = len(split), split.y[0].numel()
    device = next(model.parameters()).device
    chosen = torch.arange(0, N, -(-N * targets // MOST_TARGETS), device=split.x.device)
    chunks = []
    model.eval()
    try:
        for indices in chosen.split(max(1, min(CHUNK, CHUNK_TARGETS // targets))):
            x, y = (part.to(device) for part in split.take(indices))
            norms = gradstats.compute(model, mean_loss, x, y, statistics=["norms"]).total_norms
            assert norms is not None
            with torch.no_grad():
                logits = model(x)
            losses = F.cross_entropy(logits.flatten(0, -2), y.flatten(), reduction="none")
            chunks.append((indices, norms, losses.view(len(y), -1).mean(1), logits.argmax(-1)))
    finally:
        model.train()
    return Hardness(*(torch.cat(parts) for parts in zip(*chunks, strict=True)))


def mean_loss(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), y.flatten())


def depict(x: Tensor, vocabulary: str | None) -> Cell:
    """An image as a picture, grey unless it has three channels, from its darkest to its brightest value; text as it
    reads; other features as numbers."""
    if vocabulary is not None:
        return spell(x, vocabulary)
    if x.ndim != 3:
        return ", ".join(f"{value:.3g}" for value in x.flatten().tolist())
    image = x.float().cpu()
    image = image if len(image) == 3 else image.mean(0, keepdim=True)
    low, high = image.aminmax()
    pixels = ((image - low) / (high - low).clamp(min=torch.finfo(torch.float32).tiny) * 255).round().byte()
    times = -(-SHORTEST_SIDE // min(pixels.shape[1:]))
    enlarged = pixels.repeat_interleave(times, 1).repeat_interleave(times, 2).permute(1, 2, 0).numpy()  # (H, W, C)
    return Picture(np.squeeze(enlarged, 2) if enlarged.shape[2] == 1 else enlarged)


def spell(classes: Tensor, vocabulary: str | None) -> Cell:
    """One class is its number; a sequence is the text that its characters make."""
    if classes.ndim == 0:
        return int(classes)
    values = classes.tolist()
    return " ".join(map(str, values)) if vocabulary is None else "".join(vocabulary[value] for value in values)
