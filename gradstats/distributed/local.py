"""What this rank has of a tensor that is spread over ranks, and all of it. Other tensors are what they are."""

from __future__ import annotations

from torch import Tensor

from gradstats.distributed.spread import DTensor, Partial, Placement, Shard


def local(t: Tensor) -> Tensor:
    """The part that is here."""
    return t.to_local() if isinstance(t, DTensor) else t


def whole(t: Tensor) -> Tensor:
    """All of it. All ranks must ask."""
    return t.full_tensor() if isinstance(t, DTensor) else t


def total(part: Tensor, like: Tensor) -> Tensor:
    """A sum over all elements of a tensor spread as `like`, from the sums over those that each rank has. All ranks must
    ask."""
    if not isinstance(like, DTensor):
        return part
    placements: list[Placement] = [Partial() if isinstance(p, Shard) else p for p in like.placements]
    return DTensor.from_local(part, like.device_mesh, placements).full_tensor()
