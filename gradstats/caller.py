"""A caller: an attached module that is no leaf. The outermost one under way tells where a forward begins and ends."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from gradstats.engines.fused import FusedHandle

LEAF = "_gradstats_leaf"  # where an attached module keeps its Leaf or Caller, outside of parameters and state_dict


class Caller:
    """What an attached module without a leaf of its own keeps."""

    def __init__(self, handle: FusedHandle, module: nn.Module, prefix: str):
        self.handle, self.module, self.prefix = handle, module, prefix

    @property
    def active(self) -> bool:
        return self.handle.probing is not None or self.handle.outside(self.module)

    # What Dynamo cannot trace runs here; its bookkeeping must not be traced by itself.
    @partial(torch.compiler.disable, recursive=False)
    def __call__(self, kind: type[nn.Module], args: tuple, kwargs: dict[str, Any]) -> Any:
        """The module's own forward, noted as a caller by a probe, or as the outermost one."""
        if self.handle.probing:
            with self.handle.probing.calling(self.module):
                return kind.forward(self.module, *args, **kwargs)
        if not self.handle.differentiates:
            with self.handle.lifetime.checkpointing.evaluation():
                return kind.forward(self.module, *args, **kwargs)

        def call() -> Any:
            server = self.module.__dict__[LEAF]  # which the probe may have replaced by a leaf
            return kind.forward(self.module, *args, **kwargs) if server is self else server(kind, args, kwargs)

        return self.handle.outermost(self.module, args, kwargs, call)
