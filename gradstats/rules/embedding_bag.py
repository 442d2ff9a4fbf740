"""EmbeddingBag: y_n is the sum, mean or maximum of the rows w[ids_nt] of a bag. Bags are examples."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from gradstats.contribution import Contribution
from gradstats.forms.rows import Rows, firsts
from gradstats.rules.embedding import Embedding
from gradstats.rules.registry import Rule, refuse, rule

aten = torch.ops.aten
SUM, MEAN, MAX = range(3)  # as torch's kernel numbers them
MODES = {"sum": SUM, "mean": MEAN, "max": MAX}


@rule(nn.EmbeddingBag)
class EmbeddingBag(Rule):
    """c_b[r] = sum of a_bt d_b over the positions t with ids_bt = r; none for the padding row.

    The share a_bt is 1 for a sum, 1/size of the bag for a mean, or what the caller gives (per_sample_weights). A
    maximum is taken element by element, and the share is 1 at the first position that attains it, 0 elsewhere. Bags
    given by offsets are padded to the longest one: ids (n, t) with lengths (n,).
    """

    parameters = ("weight",)
    inputs = ("input", "lengths", "per_sample_weights")

    @staticmethod
    def check(module):
        Embedding.check(module)
        if module.scale_grad_by_freq:
            raise refuse(
                module,
                "scale_grad_by_freq divides by other rows' frequencies on a CPU (pytorch/pytorch#190063)",
                "Build it with scale_grad_by_freq=False",
            )

    @staticmethod
    def bind(module, input, offsets=None, per_sample_weights=None):
        if offsets is None:
            return input, None, per_sample_weights
        bounds = offsets.tolist() if module.include_last_offset else [*offsets.tolist(), len(input)]
        if input.dim() != 1 or bounds[0] != 0 or bounds[-1] != len(input) or bounds != sorted(bounds):
            raise ValueError(f"offsets must rise from 0 to the end of the ids {tuple(input.shape)}; got {bounds}")
        lengths = [end - start for start, end in pairwise(bounds)]

        def padded(values: Tensor) -> Tensor:
            return pad_sequence(values.split(lengths), batch_first=True)

        weights = None if per_sample_weights is None else padded(per_sample_weights)
        return padded(input), torch.tensor(lengths, device=input.device), weights

    @staticmethod
    def unbatched(module, x):
        return x[0].dim() != 2

    @staticmethod
    def looked_up(x):
        return x[0]

    @staticmethod
    def options(module):
        return MODES[module.mode], module.padding_idx

    @staticmethod
    def forward(options, x, parameters):
        mode, padding_idx = options
        (ids, lengths, given), table = x, parameters["weight"]
        if lengths is None:
            lengths = torch.full((len(ids),), ids.shape[1], device=ids.device)
            flat, shares = ids.flatten(), given if given is None else given.flatten()
        else:
            inside = within(ids, lengths)
            flat, shares = ids[inside], given if given is None else given[inside]
        padding_idx = -1 if padding_idx is None else padding_idx
        y, _, _, highest = aten._embedding_bag(
            table, flat, lengths.cumsum(0) - lengths, False, mode, False, shares, False, padding_idx
        )
        return y, (ids, lengths, given, table, highest if mode == MAX else None)

    @staticmethod
    def backward(options, saved, d, wanted):
        mode, padding_idx = options
        ids, lengths, given, table, highest = saved
        counted = within(ids, lengths)  # (n, t)
        if padding_idx is not None:
            counted &= ids != padding_idx
        grad_given = None
        if "per_sample_weights" in wanted:
            grad_given = (F.embedding(ids, table) @ d.unsqueeze(2)).squeeze(2).masked_fill(~counted, 0)
        contributions: dict[str, Contribution] = {}
        if "weight" in wanted:
            if mode == MAX:
                place = torch.arange(ids.shape[1], device=ids.device)
                once = torch.where(counted & (firsts(ids) == place), ids, len(table))  # no row has the number of rows
                share = highest.unsqueeze(1) == once.unsqueeze(2)  # (n, t, o)
            else:
                share = (counted if given is None else given * counted).to(d.dtype).unsqueeze(2)  # (n, t, 1)
            if mode == MEAN:
                share = share / counted.sum(1).clamp(min=1).reshape(-1, 1, 1)
            contributions["weight"] = Rows(ids, d.unsqueeze(1) * share, len(table))
        return (None, None, grad_given), contributions


def within(ids: Tensor, lengths: Tensor) -> Tensor:
    """Which positions (n, t) belong to their bag."""
    return torch.arange(ids.shape[1], device=ids.device) < lengths.unsqueeze(1)
