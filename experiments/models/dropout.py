"""Dropout whose masks do not depend on the batch size, or on how many processes share a batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from experiments.errors import UserError


class StreamDropout(nn.Dropout):
    """Dropout whose mask belongs to the position in the stream of examples, as the example itself does.

    On the CPU, torch.rand draws number after number: a batch of 4 gets the masks of 4 batches of 1, where nn.Dropout
    draws for a whole batch at once. Runs that differ in the batch size alone share masks as they share examples.

    A process that has a part of every batch draws for the rows before and after it too: all processes, however many,
    have one state of the generator.
    """

    before, after = 0, 0

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        shape = (self.before + len(x) + self.after, *x.shape[1:])
        drawn = torch.rand(shape, dtype=x.dtype, device=x.device)
        return x * (drawn[self.before : self.before + len(x)] >= self.p) / (1 - self.p)


def share_draws(model: nn.Module, rows: slice, batch_size: int) -> None:
    """The model's dropout is for these rows of every batch."""
    for module in model.modules():
        if isinstance(module, StreamDropout):
            module.before, module.after = rows.start, batch_size - rows.stop


def check_dropout(p: float) -> None:
    """Raises UserError for what is no probability of dropping."""
    if not 0 <= p < 1:
        raise UserError(f"model.dropout={p} must be at least 0 and less than 1")
