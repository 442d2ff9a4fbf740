"""A training step on tensors without memory: what it takes plainly, and with statistics.

Plain torch is not computed by formulas: its own operations run, and are counted. What statistics add to memory is put
where their layers are differentiated: sums shaped like the parameters, and what the layers' prices say. Models are
made, and all this is called, under FakeTensorMode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from experiments.errors import UserError
from experiments.planning.layers import Call, Layer, Spec
from experiments.planning.live import Live

aten = torch.ops.aten
Loss = Callable[[], Tensor]  # a forward pass
Sums = Callable[[Tensor], list[Tensor]]  # those of a parameter


def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def attention_backward(d: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(d, query, key, value)


# torch counts those of GPUs; on the CPU the same attention is another operation.
OF_CPU = {
    aten._scaled_dot_product_flash_attention_for_cpu: attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
}


@dataclass(frozen=True)
class Step:
    """A plain step, in FLOPs and in bytes beside parameters and optimizer."""

    calls: list[Call]  # in the forward pass, of the layers that own parameters
    flops: int
    kept: int  # between forward and backward
    peak: int  # with gradients as they come


def plain(model: nn.Module, loss: Loss) -> Step:
    calls, flops = counted(model, loss)
    # By itself: what counts FLOPs keeps tensors.
    with Live(known=model.parameters()) as live:
        value = loss()
        kept = live.now
        value.backward()
        clear(model)
    return Step(calls, flops, kept, live.peak)


def counted(model: nn.Module, loss: Loss) -> tuple[list[Call], int]:
    calls: list[Call] = []
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if any(p is not None for p in module._parameters.values()):
                stack.callback(module.register_forward_hook(recorder(name, calls)).remove)
        counter = stack.enter_context(FlopCounterMode(display=False, custom_mapping=OF_CPU))
        value, seen = loss(), len(calls)  # those after it are of checkpointing
        value.backward()
        clear(model)
    return calls[:seen], counter.get_total_flops()


def recorder(name: str, calls: list[Call]) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
    def record(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not isinstance(output, Tensor) or len(args) != 1:
            raise UserError(f"{name} ({type(module).__name__}): no formula says what statistics of such a layer cost")
        calls.append(Call(name, module, Spec.of(args[0]), Spec.of(output)))

    return record


def clear(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad = None


def peak(model: nn.Module, loss: Loss, layers: Sequence[Layer], sums: Sums, shards: int = 1) -> int:
    """Of a step that gathers sums, in bytes beside parameters and optimizer; where parameters have shards, only one of
    their gradient and of its sums stays."""
    backward = Backward(layers, sums, shards)
    with ExitStack() as stack:
        for module in backward.layers:
            stack.callback(module.register_forward_hook(backward.follow).remove)
        for p in model.parameters():
            stack.callback(p.register_post_accumulate_grad_hook(backward.accumulated).remove)
        live = stack.enter_context(Live(known=model.parameters()))
        loss().backward()
        clear(model)
    return live.peak


class Backward:
    """What comes and goes in a backward pass beside plain torch's."""

    def __init__(self, layers: Sequence[Layer], sums: Sums, shards: int) -> None:
        self.layers = {layer.call.module: layer for layer in layers}
        self.sums, self.shards = sums, shards
        self.held: dict[Tensor, list[Tensor]] = {}
        self.waiting: list[Tensor] = []
        self.temporary: Tensor | None = None

    def follow(self, module: nn.Module, args: Any, output: Tensor) -> None:
        output.register_hook(lambda d: self.reached(module))

    def reached(self, module: nn.Module) -> None:
        self.temporary = None
        for p in module.parameters(recurse=False):
            if p.requires_grad and p not in self.held:
                self.held[p] = self.sums(p)
        self.waiting.append(room(self.layers[module].waiting))
        self.temporary = room(self.layers[module].temporary)

    def accumulated(self, p: Tensor) -> None:
        self.temporary = None
        if self.shards > 1:
            p.grad = None
            self.held[p] = [torch.empty_like(shard(t, self.shards)) for t in (p, *self.held.get(p, []))]


def room(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8)


def shard(tensor: Tensor, shards: int) -> Tensor:
    """The first rank's part along the first dimension, as FSDP cuts it: the largest."""
    return tensor[: -(-len(tensor) // shards)] if tensor.dim() else tensor
