"""What a layer's statistics cost in a step, from its own rule."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from experiments.errors import UserError
from experiments.planning.live import Live
from experiments.planning.work import Work, looked_up, work
from gradstats.contribution import Contribution
from gradstats.forms.rows import Rows
from gradstats.function import autocast, no_autocast
from gradstats.rules.registry import Rule, checked, find


class Spec(NamedTuple):
    """A tensor without its memory."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    differentiable: bool = False

    @classmethod
    def of(cls, tensor: Tensor) -> Spec:
        return cls(tuple(tensor.shape), tensor.dtype, tensor.requires_grad)

    def make(self) -> Tensor:
        return torch.zeros(self.shape, dtype=self.dtype)


class Call(NamedTuple):
    """Of a layer that owns parameters, as the plain step has made it."""

    name: str
    module: nn.Module
    input: Spec
    output: Spec

    @property
    def kind(self) -> str:
        return type(self.module).__name__


@dataclass
class Layer:
    """temporary: bytes beside what plain torch takes while the layer is differentiated; waiting: bytes from then on
    until the step is over."""

    call: Call
    works: list[Work]
    temporary: int
    waiting: int = 0

    @property
    def plain(self) -> int:
        """FLOPs of forward and backward in plain torch: output, gradient of the parameters, and of the input if it has
        one, are as many matmuls of the same size."""
        return (2 + self.call.input.differentiable) * sum(one.gradient for one in self.works)


def price(calls: Collection[Call], sums: Collection[str], on_gpu: bool = False) -> list[Layer]:
    """Of all layers of a step. Raises: UserError for a layer without a rule, and for a parameter of several layers that
    are not an embedding and one other."""
    layers: list[Layer] = []
    users: dict[Tensor, list[tuple[Layer, Contribution]]] = {}
    for call in calls:
        forms, held, peak = differentiated(call)
        works = [work(form, sums, on_gpu) for form in forms.values()]
        temporary = max(peak, held + max((one.temporary for one in works), default=0))
        layers.append(Layer(call, works, temporary))
        for name, form in forms.items():
            users.setdefault(call.module.get_parameter(name), []).append((layers[-1], form))
    for shared in users.values():
        if len(shared) > 1:
            share(shared)
    return layers


def differentiated(call: Call) -> tuple[dict[str, Contribution], int, int]:
    """What the rule's backward pass returns for the parameters, the bytes of it, and those that it has had at most,
    without the gradient of the input, which plain torch has too."""
    module, rule = call.module, find(call.module)
    if rule is None or not issubclass(rule, Rule) or len(rule.inputs) > 1:
        raise UserError(f"{call.name} ({call.kind}): no formula says what statistics of such a layer cost")
    checked(call.name, rule.check, module)
    wanted = {name for name, p in module._parameters.items() if p is not None and p.requires_grad}
    if call.input.differentiable:
        wanted.add("input")
    d, options = call.output.make(), rule.options(module)
    with torch.no_grad():
        x, parameters = autocast(rule.autocast, "cpu", call.input.make(), module._parameters)
        with no_autocast("cpu"):
            _, saved = rule.forward(options, x, parameters)
            with Live(known=[x, d, *(t for t in saved if isinstance(t, Tensor))]) as live:
                grad_input, forms = rule.backward(options, saved, d, frozenset(wanted))
    plain = 0 if grad_input is None else grad_input.nbytes
    return forms, live.now - plain, live.peak - plain


def share(users: list[tuple[Layer, Contribution]]) -> None:
    """What it takes more that a parameter is an embedding's and another layer's."""
    lookups = [form for _, form in users if isinstance(form, Rows)]
    others = [(layer, form) for layer, form in users if not isinstance(form, Rows)]
    if len(lookups) != 1 or len(others) != 1:
        names = ", ".join(layer.call.name for layer, _ in users)
        raise UserError(f"{names} share a parameter: there is a formula for an embedding and one other layer only")
    layer, head = others[0]
    more, waiting = looked_up(head, lookups[0].ids.shape[1])
    layer.works.append(more)
    layer.temporary = max(layer.temporary, more.temporary + waiting)
    layer.waiting = waiting
