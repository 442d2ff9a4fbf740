"""What torch has for tensors and models that are spread over ranks. Where it was built without torch.distributed,
nothing is: no object is an instance of these."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.distributed as dist

if TYPE_CHECKING or dist.is_available():
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
else:
    DTensor = FSDPModule = Partial = Placement = Replicate = Shard = type("Absent", (), {})

__all__ = ["DTensor", "FSDPModule", "Partial", "Placement", "Replicate", "Shard"]
