"""Tensors of several shapes in one flat buffer, so that one collective takes them all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Parcel(NamedTuple):
    """A flat buffer, and what lies in it where."""

    flat: Tensor
    contents: Mapping[Any, Tensor]  # as they were sent, of which shape and dtype are needed
    begin: int  # what lies before is not ours

    def opened(self) -> dict[Any, Tensor]:
        """Its contents, in memory of their own, since the buffer holds the gradients of the bucket too."""
        found, place = {}, self.begin
        for key, sent in self.contents.items():
            size = sent.numel()
            found[key] = self.flat[place : place + size].view(sent.shape).to(sent.dtype, copy=True)
            place += size
        return found


def packed(contents: Mapping[Any, Tensor], before: Tensor | None = None) -> Parcel:
    """A parcel on one device and in one dtype, the widest; what comes before is no narrower."""
    tensors = [t.reshape(-1) for t in contents.values()]
    if before is not None:
        tensors.insert(0, before)
    dtype = tensors[0].dtype
    for t in tensors[1:]:
        dtype = torch.promote_types(dtype, t.dtype)
    flat = torch.cat([t.to(tensors[0].device, dtype) for t in tensors])
    return Parcel(flat, contents, 0 if before is None else before.numel())
