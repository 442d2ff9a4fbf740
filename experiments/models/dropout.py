"""Dropout whose masks do not depend on the batch size."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from experiments.errors import UserError


class StreamDropout(nn.Dropout):
    """Dropout whose mask belongs to the position in the stream of examples, as the example itself does.

    On the CPU, torch.rand draws number after number: a batch of 4 gets the masks of 4 batches of 1, where nn.Dropout
    draws for a whole batch at once. Runs that differ in the batch size alone share masks as they share examples.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * (torch.rand_like(x) >= self.p) / (1 - self.p)


def check_dropout(p: float) -> None:
    """Raises UserError for what is no probability of dropping."""
    if not 0 <= p < 1:
        raise UserError(f"model.dropout={p} must be at least 0 and less than 1")
