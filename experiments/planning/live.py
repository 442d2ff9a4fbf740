"""Bytes of tensors that are alive, counted while operations run on tensors without memory."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """Inside: `now`, bytes of all storages that operations have made and nobody has dropped, and their `peak`.

    What is used before counts too, unless it is `known`. What an operation takes for itself and gives back is not seen.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.sizes: dict[int, int] = {}  # by storage
        for tensor in known:
            self.meet(tensor.untyped_storage(), 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.meet(storage, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def meet(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = size
            self.now += size
            weakref.finalize(storage, self.leave, key)

    def leave(self, key: int) -> None:
        self.now -= self.sizes.pop(key)
