"""Embedding: y_nt = w[ids_nt]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from gradstats.forms.rows import Rows
from gradstats.rules.registry import Rule, refuse, rule


@rule(nn.Embedding)
class Embedding(Rule):
    """c_b[r] = sum of d_bt over the positions t with ids_bt = r; none for the padding row."""

    parameters = ("weight",)
    leading_alike = True

    @staticmethod
    def check(module):
        if module.sparse:
            raise refuse(module, "sparse gradients have no per-example statistics", "Build it with sparse=False")
        if module.max_norm is not None:
            raise refuse(
                module,
                "max_norm rewrites the table during the forward",
                "Renormalise the table yourself after the step",
            )

    @staticmethod
    def unbatched(module, x):
        return x.dim() < 1

    @staticmethod
    def looked_up(x):
        return x

    @staticmethod
    def options(module):
        rows, padding = module.num_embeddings, module.padding_idx
        return None if padding is None else padding % rows, module.scale_grad_by_freq, rows

    @staticmethod
    def forward(options, x, parameters):
        padding_idx, _, _ = options
        return F.embedding(x, parameters["weight"], padding_idx), (x,)

    @staticmethod
    def backward(options, saved, d, wanted):
        padding_idx, scale_by_frequency, rows = options
        (ids,) = saved
        ids = ids.reshape(ids.shape[0], -1)  # (n, t)
        d = d.reshape(*ids.shape, d.shape[-1])  # (n, t, o)
        if padding_idx is not None:
            d = d.masked_fill((ids == padding_idx).unsqueeze(-1), 0)
        if scale_by_frequency:
            # Counted over the whole batch, as torch does: a factor of the cotangent, not a property of the example.
            counts = torch.bincount(ids.flatten(), minlength=rows)
            d = d / counts[ids].unsqueeze(-1)
        return None, {"weight": Rows(ids, d, rows)}
