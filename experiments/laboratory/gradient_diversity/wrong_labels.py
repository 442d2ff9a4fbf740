"""Wrong labels that are planted, and how well a score of examples finds them."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor

from experiments.estimate import Array

Flags = NDArray[np.bool_]  # (N,), of the examples that have a wrong label


def planted(labels: Tensor, classes: int, share: float, seed: int) -> tuple[Tensor, Flags]:
    """Labels (N,) of which this share is moved to another class, drawn evenly; and which."""
    # Another stream than that of the order of examples, which begins with the seed too.
    random = np.random.default_rng([seed, classes, len(labels)])
    chosen = random.permutation(len(labels))[: round(share * len(labels))]
    moved = labels.clone()
    shift = torch.from_numpy(random.integers(1, classes, size=len(chosen)))
    moved[chosen] = (moved[chosen] + shift) % classes
    return moved, (moved != labels).numpy()


def share_found(score: Array, wrong: Flags, flagged: int) -> float:
    """Of the wrong labels, the share among so many examples of the highest scores: the recall.

    With as many flagged as there are wrong ones that is the precision too. Of examples with the score of the last one
    flagged each counts with the chance to be among these.
    """
    last = np.sort(score)[-flagged]
    above, at = score > last, score == last
    chance = (flagged - above.sum()) / at.sum()
    return float((wrong[above].sum() + chance * wrong[at].sum()) / wrong.sum())


def area_under_curve(score: Array, wrong: Flags) -> float:
    """The area under the receiver operating characteristic: the chance that a wrong label has a higher score than a
    right one (Mann & Whitney 1947), ties counted half."""
    ranks, n = rankdata(score), int(wrong.sum())
    return float((ranks[wrong].sum() - n * (n + 1) / 2) / (n * (len(wrong) - n)))
