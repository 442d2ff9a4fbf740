"""What a rank holds and sends.

DDP: a rank has all of everything, and buckets of all gradients; where statistics are gathered, flat copies of these
too, in which they are reduced together with the sums that are shaped like the parameters. (A few counts that go along
are left out here.)

FSDP2 (fully_shard of every block, then of the model): a rank has 1/W of parameters, gradients, sums and optimizer
state, cut along the first dimension. Whole there are the parameters outside of blocks; those of a block and of the one
fetched ahead, and the gradients of a block twice, as they are and in the order in which they are sent, or at the end as
much of what is outside of blocks; of sums, those of one layer. Parameters of blocks are gathered twice a step, the
others once.
All these need not be at the time of the peak: what is told is at most that much.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from experiments.planning.layers import Layer
from experiments.planning.setting import Setting
from experiments.planning.trace import Step, peak, shard


def nbytes(tensors: Collection[Tensor], shards: int = 1) -> int:
    return sum(shard(t, shards).numel() * t.itemsize for t in tensors)


class Memory(NamedTuple):
    """Bytes on the rank that has most. They do not add up to the peak: gradients and statistics come as activations
    go."""

    parameters: int
    gradients: int
    statistics: int
    optimizer_state: int
    activations: int
    buffers: int  # of the rule that takes most, and of the optimizer's step
    communication: int
    peak: int


def memory(setting: Setting, step: Step, layers: Sequence[Layer]) -> Memory:
    parameters, shards = setting.parameters, setting.shards
    held, gradients = nbytes(parameters, shards), nbytes(parameters, shards)
    sums = sum(nbytes(setting.sums_of(p), shards) for p in parameters)
    state = sum(size * nbytes([p], shards) // max(1, p.nbytes) for p, size in setting.state().items())
    in_backward = peak(setting.model, setting.loss, layers, setting.sums_of, shards)
    in_step = setting.step()
    rules = max((layer.temporary for layer in layers), default=0) + sum(layer.waiting for layer in layers)
    together = communication(setting)
    total = held + state + together + max(in_backward, gradients + sums + in_step)
    return Memory(held, gradients, sums, state, step.kept, max(rules, in_step), together, total)


def blocks(model: nn.Module) -> list[nn.Module]:
    """What is sharded by itself."""
    found = getattr(model, "blocks", None)
    return list(found) if isinstance(found, nn.Sequential | nn.ModuleList) else []


def communication(setting: Setting) -> int:
    """Bytes of what is there only since there are several ranks."""
    if setting.world_size == 1:
        return 0
    if not setting.sharded:
        return nbytes(setting.parameters) * (2 if setting.elementwise else 1)
    of_blocks = [nbytes(list(block.parameters())) for block in blocks(setting.model)]
    root = nbytes(setting.parameters) - sum(of_blocks)
    return root + max(4 * max(of_blocks, default=0), 2 * root)


def elementwise(setting: Setting) -> int:
    """Bytes of the sums that are shaped like the parameters."""
    return sum(raw.dtype(p.dtype).itemsize * p.numel() for raw in setting.elementwise for p in setting.parameters)


class Traffic(NamedTuple):
    """Bytes of the tensors that a collective is given, in a step of plain torch, and beside them."""

    collective: str
    plain: int
    extra: float


def traffic(setting: Setting, every: int) -> list[Traffic]:
    """Statistics that only every k-th step gathers count a k-th. Sums with an entry for each example are not sent."""
    if setting.world_size == 1:
        return []
    gradients = nbytes(setting.parameters)
    extra = elementwise(setting) / every
    if not setting.sharded:
        return [Traffic("all-reduce", gradients, extra)]
    again = sum(nbytes(list(block.parameters())) for block in blocks(setting.model))
    return [Traffic("all-gather", gradients + again, 0), Traffic("reduce-scatter", gradients, extra)]
