"""How a probing forward is watched, and kept from leaving traces."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves


class FunctionalUses(TorchFunctionMode):
    """Tells `found` of every call of torch that consumes a parameter and makes something differentiable of it.

    parameters: those that are watched, by id, with what `found` is told of them beside the function's name.
    """

    def __init__(self, parameters: Mapping[int, object], found: Callable[[str, object], None]):
        super().__init__()
        self.parameters, self.found = parameters, found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs)):
            if not isinstance(value, Tensor) or id(value) not in self.parameters:
                continue
            if any(isinstance(r, Tensor) and r.requires_grad and r is not value for r in tree_leaves(result)):
                self.found(getattr(func, "__name__", str(func)), self.parameters[id(value)])
        return result


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Random numbers and buffers are afterwards what they were; the random numbers inside are always the same."""
    kept = [(m, name, buffer) for m in model.modules() for name, buffer in m._buffers.items()]
    values = {id(buffer): buffer.clone() for _, _, buffer in kept if buffer is not None}
    devices = {p.device for p in model.parameters() if p.is_cuda}
    state = random.getstate()
    with torch.random.fork_rng(devices=list(devices)):
        torch.manual_seed(0)
        random.seed(0)
        try:
            yield
        finally:
            random.setstate(state)
            with torch.no_grad():
                for module, name, buffer in kept:
                    module._buffers[name] = buffer
                    if buffer is not None and not torch.equal(buffer, values[id(buffer)]):
                        buffer.copy_(values[id(buffer)])
