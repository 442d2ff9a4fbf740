"""What the gradients of examples look like at one moment: how much they agree, and scores that single examples out.

With g_b the gradient of example b, z its logits, y its label, n examples:

    diversity         sum_b ||g_b||^2 / ||sum_b g_b||^2      Yin et al. 2018, definition 1: Delta
    batch-size bound  n Delta                                the same: up to there larger batches lose little
    gradient norm     ||g_b||                                GraNd, Paul et al. 2021, definition 2.1
    error norm        ||softmax(z) - onehot(y)||             EL2N, the same, definition 2.2
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradstats
from experiments.data import Split

NORM, ERROR, LOSS, FORGETTING = "gradient norm", "error norm (EL2N)", "loss", "forgetting events"
SCORES = (NORM, ERROR, LOSS, FORGETTING)


@dataclass(frozen=True)
class Pairs:
    """Mean cosine similarity, and inner product, of the gradients of two examples of a kind."""

    cosine: dict[str, float]
    product: dict[str, float]


SAME, DIFFERENT = "same class", "different classes"
WRONG_TO_TRUE, WRONG_TO_GIVEN = "wrong label, its true class", "wrong label, its given class"
KINDS = (SAME, DIFFERENT, WRONG_TO_TRUE, WRONG_TO_GIVEN)


def pairs(model: nn.Module, x: Tensor, given: Tensor, true: Tensor) -> Pairs:
    """Of examples with these labels. The classes are those of pairs whose labels are right; the rest is between a wrong
    label and right ones of the class that it should name, or that it names. Not a number where there are none."""
    found = gradstats.compute(model, F.cross_entropy, x, given, statistics=["gram", "cosine_similarity"])
    right = given == true
    between = {
        SAME: (given[:, None] == given) & right[:, None] & right & ~torch.eye(len(x), dtype=torch.bool),
        DIFFERENT: (given[:, None] != given) & right[:, None] & right,
        WRONG_TO_TRUE: ~right[:, None] & right & (true[:, None] == given),
        WRONG_TO_GIVEN: ~right[:, None] & right & (given[:, None] == given),
    }
    cosine, gram = (found.totals[name] for name in ("cosine_similarity", "gram"))
    return Pairs(*({kind: float(of[mask].mean()) for kind, mask in between.items()} for of in (cosine, gram)))


@dataclass(frozen=True)
class Singles:
    """scores: of each example (N,); bound: n Delta over all of them; prediction (N,)."""

    scores: dict[str, Tensor]
    bound: float
    prediction: Tensor


def singles(model: nn.Module, split: Split) -> Singles:
    found = gradstats.compute(model, F.cross_entropy, split.x, split.y, statistics=["norms"])
    norms = found.total_norms
    assert norms is not None
    with torch.no_grad():
        logits = model(split.x)
    error = logits.softmax(1) - F.one_hot(split.y, logits.shape[1])
    scores = {NORM: norms, ERROR: error.norm(dim=1), LOSS: F.cross_entropy(logits, split.y, reduction="none")}
    mean = torch.cat([g.flatten() for g in found.gradients.values()])
    return Singles(scores, batch_size_bound(norms, mean), logits.argmax(1))


def batch_size_bound(norms: Tensor, mean: Tensor) -> float:
    """n Delta = mean_b ||g_b||^2 / ||mean_b g_b||^2, which is 1 + the simple noise scale over these examples."""
    return float(norms.square().mean() / mean.square().sum())
