"""Tensors of several shapes in one flat buffer, so that one collective takes them all."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Parcel(NamedTuple):
    """A flat buffer, and what lies in it where."""

    flat: Tensor
    shapes: Mapping[Hashable, torch.Size]
    begin: int  # what lies before is not ours

    def opened(self) -> dict[Any, Tensor]:
        """Its contents, in memory of their own, since the buffer holds the gradients of the bucket too."""
        found, place = {}, self.begin
        for key, shape in self.shapes.items():
            size = math.prod(shape)
            found[key] = self.flat[place : place + size].reshape(shape).clone()
            place += size
        return found


def packed(contents: Mapping[Any, Tensor], before: Tensor | None = None) -> Parcel:
    """A parcel in one dtype and on one device: those of `before`, which comes first, or the widest of the contents'."""
    tensors = [t.reshape(-1) for t in contents.values()]
    if before is not None:
        tensors.insert(0, before)
    dtype = tensors[0].dtype
    for t in tensors[1:]:
        dtype = torch.promote_types(dtype, t.dtype)
    flat = torch.cat([t.to(tensors[0].device, dtype) for t in tensors])
    return Parcel(flat, {key: t.shape for key, t in contents.items()}, 0 if before is None else before.numel())
