"""What the loops of others are tested on: a small GPT-2, sentences of uneven lengths, the oracle of a whole step."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import gradstats
from tests import oracle

Batch = dict[str, Tensor]

MAX_NORM = 0.1
OPTIONS = {"lr": 1e-3, "batch_size": 16, "reference_batch_size": 4, "eps": 1e-6}


def language_model() -> nn.Module:
    """Without dropout, whose masks the oracle does not know."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 31, "n_positions": 8, "n_embd": 16, "n_layer": 1, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0))


def sentences(count: int) -> list[Batch]:
    """Two to eight tokens, padded to eight; the labels of padding are -100."""
    torch.manual_seed(1)
    found = []
    for _ in range(count):
        real = torch.arange(8) < torch.randint(2, 9, ())
        ids = torch.randint(0, 31, (8,))
        found.append({"input_ids": ids, "attention_mask": real.long(), "labels": ids.where(real, -100)})
    return found


def token_sum(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")


def tokens(labels: Tensor) -> Tensor:
    """How many are predicted."""
    return labels[:, 1:].ne(-100).sum()


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """The mean over the tokens of a batch."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return token_sum(logits, batch["labels"]) / tokens(batch["labels"])


def weighted(weight: float) -> Callable[[Any, Tensor], Tensor]:
    return lambda output, labels: weight * token_sum(output["logits"], labels)


def contributions(model: nn.Module, batches: Sequence[Batch], weights: Sequence[float]) -> dict[str, Tensor]:
    """c_b of the examples of all batches, for a loss that is the sum of token losses, each times its batch's weight."""
    model = copy.deepcopy(model)
    gradstats.attached(model).detach()
    parts = []
    for batch, weight in zip(batches, weights, strict=True):
        x = {name: batch[name] for name in ("input_ids", "attention_mask")}
        parts.append(oracle.contributions(model, weighted(weight), x, batch["labels"], cut=("logits",)))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def clipped(c: dict[str, Tensor]) -> dict[str, Tensor]:
    """The contributions to the clipped gradient."""
    norm = torch.cat([part.sum(0).flatten() for part in c.values()]).norm()
    assert norm > 2 * MAX_NORM
    return {name: part * (MAX_NORM / (norm + 1e-6)) for name, part in c.items()}


def first_second_moment(c: Tensor, reference: int) -> Tensor:
    """v_R, which is what Adam's s is after one step."""
    return c.sum(0).square() + (1 / reference - 1 / len(c)) * oracle.variance(c)
