"""Random crops and flips, on the device; each belongs to a position in the stream of examples, whatever B is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from experiments.sampler import by_epoch

STREAM = 1  # apart from the sampler's permutations, which have the same seed


@dataclass(frozen=True)
class Augmentation:
    """Images with a border of `crop` zeros, cut to their size again anywhere; `flip`: half of them are mirrored."""

    crop: int
    flip: bool

    def draws(self, seed: int, examples: int, start: int, stop: int) -> NDArray[np.int64]:
        """Row and column of the cut, and whether it is mirrored, of the examples from start to stop, (..., 3)."""
        high = [2 * self.crop + 1, 2 * self.crop + 1, 2 if self.flip else 1]

        def draw(epoch: int) -> NDArray[np.int64]:
            return np.random.default_rng([seed, epoch, STREAM]).integers(0, high, size=(examples, 3))

        return by_epoch(draw, examples, start, stop)

    def apply(self, x: Tensor, draws: Tensor) -> Tensor:
        """Images (B, C, H, W) as draws (B, 3) say."""
        row, column, mirrored = draws.unsqueeze(-1).unbind(1)  # (B, 1) each
        height, width = x.shape[2:]
        rows = row + torch.arange(height, device=x.device)  # (B, H)
        columns = torch.arange(width, device=x.device)
        columns = column + torch.where(mirrored == 1, width - 1 - columns, columns)  # (B, W)
        padded = F.pad(x, [self.crop] * 4).permute(0, 2, 3, 1)  # (B, H + 2 crop, W + 2 crop, C)
        example = torch.arange(len(x), device=x.device)[:, None, None]
        return padded[example, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
