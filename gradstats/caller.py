"""A caller: an attached module that is no leaf. The outermost one under way tells where a forward begins and ends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gradstats.swap import LEAF

if TYPE_CHECKING:
    from gradstats.engines.fused import FusedHandle


class Caller:
    """What an attached module without a leaf of its own keeps."""

    def __init__(self, handle: FusedHandle, module: nn.Module, prefix: str):
        self.handle, self.module, self.prefix = handle, module, prefix

    @property
    def active(self) -> bool:
        return self.handle.probing is not None or self.handle.outside

    def __call__(self, kind: type[nn.Module], args: tuple, kwargs: dict[str, Any]) -> Any:
        """The module's own forward, noted as a caller by a probe, or as the outermost one."""
        if self.handle.probing:
            with self.handle.probing.calling(self.module):
                return kind.forward(self.module, *args, **kwargs)
        with self.handle.outermost(self.module, args, kwargs):
            server = self.module.__dict__[LEAF]  # which the probe may have replaced by a leaf
            return kind.forward(self.module, *args, **kwargs) if server is self else server(kind, args, kwargs)

    def compiling(self, kind: type[nn.Module], args: tuple, kwargs: dict[str, Any]) -> Any:
        """The same where torch.compile traces: only what is noted breaks the graph."""
        self._begin(args, kwargs)
        try:
            return kind.forward(self.module, *args, **kwargs)
        finally:
            self._end()

    @torch.compiler.disable
    def _begin(self, args: tuple, kwargs: dict[str, Any]) -> None:
        self.handle.begin(self.module, args, kwargs)

    @torch.compiler.disable
    def _end(self) -> None:
        self.handle.lifetime.leave(self.module)
