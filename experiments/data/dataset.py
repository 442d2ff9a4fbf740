"""What a data set is to the training loop."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.data.augmentation import Augmentation
from experiments.errors import UserError


@dataclass(frozen=True)
class Split:
    """Examples, with one target each or, in a sequence, one a position; where it does not fit on the device, the
    training set is on the host."""

    x: Tensor  # (N, features), (N, channels, height, width) float32, or (N, T) int64 or uint16
    y: Tensor  # (N,) or (N, T) class of each target, int64 or uint16
    mapped: bool = False  # to a file, which is read where it is looked at

    def __len__(self) -> int:
        return len(self.y)

    def take(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """x and y of these examples, of the types that models take."""
        x, y = self.x.index_select(0, indices), self.y.index_select(0, indices)
        return x if x.is_floating_point() else x.long(), y.long()

    def spread(self, count: int) -> Split:
        """So many of the examples, evenly over the order they are in; all if there are fewer."""
        if count < 1:
            raise UserError(f"data.evaluated={count} must be positive")
        count = min(count, len(self))
        chosen = torch.linspace(0, len(self) - 1, count, dtype=torch.float64, device=self.x.device).round().long()
        return Split(*self.take(chosen))

    def to(self, device: torch.device) -> Split:
        return Split(self.x.to(device), self.y.to(device))


def placed(split: Split, device: torch.device) -> Split:
    """On the device, or on the host where it would take more than half of the device's free memory."""
    size = split.x.nbytes + split.y.nbytes
    stays = device.type == "cuda" and size > torch.cuda.mem_get_info(device)[0] / 2
    return split if stays else split.to(device)


@dataclass(frozen=True)
class Dataset:
    """sample: the part of the training set on which its loss is evaluated, where all of it would take too long.

    sha256 is of the text that examples were made from, where another machine may have another one; vocabulary is its
    characters, in the order of their classes.
    """

    train: Split
    test: Split
    classes: int
    sample: Split | None = None
    sha256: str | None = None
    vocabulary: str | None = None
    augmentation: Augmentation | None = None

    @property
    def evaluated(self) -> Split:
        """What stands for the training set in evaluations."""
        return self.train if self.sample is None else self.sample

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one example."""
        return tuple(self.train.x.shape[1:])

    @property
    def discrete(self) -> bool:
        """Whether examples are made of classes, as text is of characters, rather than of numbers."""
        return not self.train.x.is_floating_point()
