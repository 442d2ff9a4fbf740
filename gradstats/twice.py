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

Places = tuple[tuple[int | None, Any], ...]  # of every argument: where it is saved, or itself


def placed(arguments: Sequence[Any], saved: Sequence[Any], inputs: int) -> tuple[list[Any], Places]:
    """What to save, and the places of a rule's arguments in it.

    An input that the rule has no use for is saved too, since who offloads or recomputes what is saved must see it. A
    parameter is there anyway.
    """
    kept, places = list(saved), []
    for i, argument in enumerate(arguments):
        place = None
        if isinstance(argument, Tensor):
            place = next((j for j, s in enumerate(kept) if s is argument), None)
            if place is None and i < inputs:
                place = len(kept)
                kept.append(argument)
        places.append((place, argument if place is None else None))
    return kept, tuple(places)


def arguments_at(places: Places, saved: Sequence[Any]) -> list[Any]:
    """The arguments, which are functions of what they were functions of."""
    return [value if place is None else saved[place] for place, value in places]


def differentiable(call: Call, arguments: Sequence[Any], d: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The gradient of every argument, as a function of the arguments and of the cotangents d of the outputs."""
    # Aliases: the path by which an input depends on a parameter is not the layer's.
    own = [a.view_as(a) if isinstance(a, Tensor) and a.requires_grad else a for a in arguments]
    first = len(call.rule.inputs)
    x = tuple(own[:first]) if call.several else own[0]
    y, _ = call.rule.forward(call.options, x, dict(zip(call.names, own[first:], strict=True)))
    pairs = [
        (o, cotangent)
        for o, cotangent in zip(y if isinstance(y, tuple) else (y,), d, strict=True)
        if cotangent is not None and o.requires_grad
    ]
    asked = [i for i, a in enumerate(own) if isinstance(a, Tensor) and a.requires_grad]
    gradients: list[Tensor | None] = [None] * len(own)
    if pairs:
        outputs, cotangents = zip(*pairs, strict=True)
        found = torch.autograd.grad(outputs, [own[i] for i in asked], cotangents, create_graph=True, allow_unused=True)
        for i, gradient in zip(asked, found, strict=True):
            gradients[i] = gradient
    return gradients
