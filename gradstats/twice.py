"""Second derivatives, as Hessian-vector products take them, by `create_graph=True`.

The gradients of a leaf are then those of its rule's forward, run once more in autograd's own operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from gradstats.function import Call

# Of every argument: where it is saved; or itself, with its version if it is a tensor.
Places = tuple[tuple[int | None, Any, int], ...]


def placed(arguments: Sequence[Any], saved: Sequence[Any], inputs: int) -> tuple[list[Any], Places | None]:
    """What to save, and the places of a rule's arguments in it; None if an input is not kept.

    An input of which the rule saves a view is saved too, so that hooks on saved tensors see it: those of checkpointing
    and offloading. One of which it saves a copy is not kept, which would take as much memory again. A parameter that it
    does not save is held as it is: the gradients do not need it, so that it may change before the backward pass.
    """
    kept: list[Any] = list(saved)
    places: list[tuple[int | None, Any, int]] = []
    for i, argument in enumerate(arguments):
        place = place_of(argument, kept)
        if place is not None:
            places.append((place, None, 0))
        elif not isinstance(argument, Tensor):
            places.append((None, argument, 0))
        elif i >= inputs:
            places.append((None, argument, argument._version))
        elif any(isinstance(s, Tensor) and share_memory(s, argument) for s in saved):
            places.append((len(kept), None, 0))
            kept.append(argument)
        else:
            return list(saved), None
    return kept, tuple(places)


def place_of(argument: Any, saved: Sequence[Any]) -> int | None:
    for i, s in enumerate(saved):
        if s is argument:
            return i
    return None


def share_memory(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def arguments_at(places: Places, saved: Sequence[Any]) -> list[Any]:
    """The rule's arguments, with the graphs that they had in the forward. Raises: RuntimeError, as autograd does, if a
    parameter was changed in place since."""
    if any(isinstance(value, Tensor) and value._version != version for _, value, version in places):
        raise RuntimeError("a parameter needed for second derivatives has been modified by an inplace operation")
    return [value if place is None else saved[place] for place, value, _ in places]


def gradients_with_graph(call: Call, arguments: Sequence[Any], d: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The gradient of every argument, as a function of the arguments and of the cotangents d of the outputs."""
    # Aliases, since an input may itself be a function of a parameter: that path is not the layer's.
    own = [a.view_as(a) if isinstance(a, Tensor) and a.requires_grad else a for a in arguments]
    first = len(call.rule.inputs)
    x = tuple(own[:first]) if call.several else own[0]
    y, _ = call.rule.forward(call.options, x, dict(zip(call.names, own[first:], strict=True)))
    pairs = zip(y if isinstance(y, tuple) else (y,), d, strict=True)
    reached = [(o, cotangent) for o, cotangent in pairs if cotangent is not None and o.requires_grad]
    asked = [a for a in own if isinstance(a, Tensor) and a.requires_grad]
    if not reached:
        return [None] * len(own)
    outputs, cotangents = zip(*reached, strict=True)
    found = iter(torch.autograd.grad(outputs, asked, cotangents, create_graph=True, allow_unused=True))
    return [next(found) if isinstance(a, Tensor) and a.requires_grad else None for a in own]
