"""How a probing forward is watched, and kept from leaving traces."""

from __future__ import annotations

import copy
import random
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from gradstats.distributed.local import local
from gradstats.graph import saves_through_hooks


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


def reached(outputs: Iterable[Tensor]) -> set[int]:
    """Ids of the parameters that tensors are differentiable functions of."""
    found: set[int] = set()
    seen: set[Node] = set()
    nodes = [o.grad_fn for o in outputs]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "torch::autograd::AccumulateGrad":
            found.add(id(node.variable))  # type: ignore[attr-defined]
        nodes.extend(following for following, _ in node.next_functions)
    return found


@contextmanager
def undisturbed(model: nn.Module, seed: int) -> Iterator[None]:
    """Random numbers, buffers and attributes are afterwards what they were; inside, the random numbers are `seed`'s.

    Parameters whose entries are all alike, as those of branches that begin at zero, are noisy inside: zeros would hide
    where they go.
    """
    devices = {p.device for p in model.parameters() if p.is_cuda}
    here = [local(p.data) for p in model.parameters()]
    alike = [p for p in here if p.numel() > 1 and bool((p == p.flatten()[0]).all())]
    state, kept = random.getstate(), [State(module) for module in model.modules()]
    numpy = sys.modules.get("numpy")  # which models may draw from, and we do not need
    drawn = numpy.random.get_state() if numpy else None
    values = [p.clone() for p in alike]
    with torch.random.fork_rng(devices=list(devices)), torch.no_grad():
        torch.manual_seed(seed)
        random.seed(seed)
        if numpy:
            numpy.random.seed(seed)
        for p in alike:
            p.add_(torch.randn_like(p) * (0.1 + p.abs() * 0.1))
        try:
            with torch.enable_grad():
                yield
        finally:
            random.setstate(state)
            if numpy:
                numpy.random.set_state(drawn)
            for p, value in zip(alike, values, strict=True):
                p.copy_(value)
            for module in kept:
                module.restore()


@contextmanager
def hidden() -> Iterator[None]:
    """Inside, neither hooks on saved tensors nor modes see anything: those of checkpointing count what a forward saves
    and what it computes."""
    # Ours only where there are others, since torch.func refuses to run under any. They detach: a tensor that is packed
    # as it is would keep its graph alive, and the graph the tensor.
    hooks = saved_tensors_hooks(torch.Tensor.detach, lambda tensor: tensor) if saves_through_hooks() else nullcontext()
    with hooks, _disable_current_modes():
        yield


class State:
    """What a module holds beside parameters and children: buffers, and attributes that count or remember."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.attributes = {k: v for k, v in module.__dict__.items() if k not in TORCHS}
        self.buffers = dict(module._buffers)
        held = [*self.attributes.values(), *self.buffers.values()]
        # Not what escaped from torch.func.vmap, which cannot be read any more.
        wrapped = torch._C._functorch.is_functorch_wrapped_tensor
        self.tensors = [(v, v.clone()) for v in held if isinstance(v, Tensor) and not wrapped(v)]
        self.objects = [(vars(v), dict(vars(v))) for v in held if is_record(v)]
        self.containers = [(v, copy.copy(v)) for v in held if isinstance(v, list | dict | set | deque)]
        self.generators = [(v, v.get_state()) for v in held if isinstance(v, torch.Generator)]

    def restore(self) -> None:
        for key in [k for k in self.module.__dict__ if k not in TORCHS and k not in self.attributes]:
            del self.module.__dict__[key]
        self.module.__dict__.update(self.attributes)
        self.module._buffers.clear()
        self.module._buffers.update(self.buffers)
        for tensor, value in self.tensors:
            if not torch.equal(tensor, value):
                tensor.copy_(value)
        for container, entries in self.containers:
            container.clear()
            container.extend(entries) if isinstance(container, list | deque) else container.update(entries)
        for record, entries in self.objects:
            record.clear()
            record.update(entries)
        for generator, value in self.generators:
            generator.set_state(value)


def is_record(value: object) -> bool:
    """An object that holds attributes of its own, such as a configuration or a counter."""
    held = isinstance(value, nn.Module | Tensor | type | list | dict | set | deque | torch.Generator)
    return not held and not callable(value) and hasattr(value, "__dict__")


TORCHS = frozenset(nn.Module().__dict__) - {"training"}  # attributes that torch.nn itself keeps
