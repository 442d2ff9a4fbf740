"""A run on labels of which some are wrong, looked at on the way."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import torch
from torch import nn

from experiments.data import Split
from experiments.estimate import Array
from experiments.laboratory.along import along, looked_at
from experiments.laboratory.gradient_diversity.look import FORGETTING, pairs, singles
from experiments.laboratory.gradient_diversity.wrong_labels import Flags, area_under_curve, planted, share_found
from experiments.laboratory.problem import data_of, predictions
from experiments.study import default_optimizer


def examples_at(epochs: float, examples: int, batch_size: int) -> int:
    """The count of examples in whole batches that is nearest."""
    return round(epochs * examples / batch_size) * batch_size


class Forgetting:
    """Forgetting events (Toneva et al. 2019, definition 2.1): how often an example that was predicted right at the end
    of an epoch is predicted wrong at the next. One that was never predicted right has more than any other."""

    def __init__(self, examples: int) -> None:
        self.events = np.zeros(examples)
        self.was_right = np.zeros(examples, dtype=bool)
        self.learnt = np.zeros(examples, dtype=bool)

    def note(self, right: Flags) -> None:
        self.events += self.was_right & ~right
        self.was_right = right
        self.learnt |= right

    def score(self) -> Array:
        return np.where(self.learnt, self.events, math.inf)


def followed(
    problem: str,
    method: str,
    lr: float,
    batch_size: int,
    warmup: int,
    share: float,
    sample: int,
    epochs: str,
    seed: int,
) -> list[dict[str, Any]]:
    """What `looked` tells after each of the epochs, comma-separated and ascending; at 0 of the initial model.

    share: of the training labels that are wrong; sample: examples of whose pairs gradients are compared.
    """
    data = data_of(problem)
    labels, wrong = planted(data.train.y, data.classes, share, seed)
    N = len(labels)
    moments = {examples_at(float(epoch), N, batch_size) for epoch in epochs.split(",")}
    ends = {examples_at(n, N, batch_size) for n in range(1, math.ceil(max(moments) / N) + 1)}
    optimizer = dataclasses.replace(default_optimizer(method), lr=lr)
    counts = sorted(moments | {count for count in ends if count <= max(moments)})
    forgetting, found = Forgetting(N), []
    for count, seen, model, _ in along(problem, optimizer, batch_size, warmup, seed, counts, labels):
        # In float64: late in training many gradients are too small for squares in float32.
        copy = looked_at(problem, seed, model).double()
        noisy = Split(seen.train.x.double(), labels)
        if count in ends:
            with torch.no_grad():
                forgetting.note((copy(noisy.x).argmax(1) == labels).numpy())
        if count in moments:
            told = looked(copy, noisy, data.train.y, wrong, sample, forgetting.score())
            test = predictions(copy, data.test.x.double()).argmax(1)
            found.append({"examples": count, "test_accuracy": float((test == data.test.y).double().mean()), **told})
    return found


def looked(
    model: nn.Module, noisy: Split, true: torch.Tensor, wrong: Flags, sample: int, forgetting: Array
) -> dict[str, Any]:
    """pairs: cosine and inner product by kind; bound: n Delta; loss: over the training set with its labels; of the
    wrong labels, by score: `found`, the share among as many of the highest scores, and `twice`, among twice as many,
    and the `area`; learnt: the share of wrong labels that the model predicts, right: of true ones in their place."""
    every = singles(model, noisy)
    spread = torch.linspace(0, len(noisy) - 1, min(sample, len(noisy))).round().long()
    compared = pairs(model, noisy.x[spread], noisy.y[spread], true[spread])
    told: dict[str, Any] = {
        "cosine": compared.cosine,
        "product": compared.product,
        "bound": every.bound,
        "loss": float(every.scores["loss"].mean()),
    }
    if not wrong.any():
        return told
    chosen = torch.from_numpy(wrong)
    scores = {name: score.numpy() for name, score in every.scores.items()} | {FORGETTING: forgetting}
    n = int(wrong.sum())
    return told | {
        "found": {name: share_found(score, wrong, n) for name, score in scores.items()},
        "twice": {name: share_found(score, wrong, 2 * n) for name, score in scores.items()},
        "area": {name: area_under_curve(score, wrong) for name, score in scores.items()},
        "learnt": float((every.prediction == noisy.y)[chosen].double().mean()),
        "right": float((every.prediction == true)[chosen].double().mean()),
    }
