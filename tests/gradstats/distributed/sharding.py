"""Models that ranks shard, beside the same model of one process, which sees all examples."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

import gradstats
from experiments.gpt import GPT
from gradstats.distributed.local import whole
from gradstats.handle import Handle

B = 8


def mlp() -> nn.Module:
    """Seven and three rows: shards of unequal sizes, and one rank of four without any."""
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Sequential(nn.Linear(7, 6), nn.Tanh()), nn.Linear(6, 3))


def convnet() -> nn.Module:
    block = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.GELU())
    return nn.Sequential(nn.Conv2d(2, 4, 3, stride=2), block, nn.Flatten(), nn.Linear(8 * 9, 3))


def gpt() -> nn.Module:
    """Embedding and head are tied, and both are the root's."""
    return GPT(11, 8, 2, 2, 6, True, False)


def numbers(*shape: int) -> Callable[[torch.Generator], tuple[Tensor, Tensor]]:
    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x = torch.randn(B, *shape, generator=generator, dtype=torch.float64)
        return x, torch.randint(3, (B,), generator=generator)

    return draw


def words(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    ids = torch.randint(11, (B, 7), generator=generator)
    return ids[:, :-1], ids[:, 1:]


def loss_of(output: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
    return F.cross_entropy(output.flatten(0, -2), y.flatten(), reduction=reduction)


MODELS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "mlp": (mlp, numbers(5)),
    "convnet": (convnet, numbers(2, 8, 8)),
    "gpt": (gpt, words),
}


def blocks(model: nn.Module) -> list[nn.Module]:
    """What is sharded by itself, before the root."""
    return list(model.blocks) if isinstance(model, GPT) else [m for m in model if isinstance(m, nn.Sequential)]


def line() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def made(name: str, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[nn.Module, nn.Module]:
    """A sharded model, and the same of one process."""
    torch.manual_seed(1)
    alone = MODELS[name][0]().to(dtype)
    return shard(copy.deepcopy(alone), **options), alone


def shard(model: nn.Module, **options: Any) -> nn.Module:
    options = {"mesh": line()} | options
    for block in blocks(model):
        fully_shard(block, **options)
    return fully_shard(model, **options)


def batches(name: str, steps: int, dtype: torch.dtype = torch.float64) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    for _ in range(steps):
        x, y = MODELS[name][1](generator)
        yield x.to(dtype) if x.is_floating_point() else x, y


def mine(t: Tensor) -> Tensor:
    """This rank's part of a batch; in one process, all of it."""
    if not dist.is_initialized():
        return t
    return t.chunk(dist.get_world_size())[dist.get_rank()]


def distance(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest entry."""
    a, b = whole(a).detach(), b.detach()
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))


def pair(name: str, *statistics: str, attachment: dict[str, Any] | None = None, **options: Any) -> tuple[Any, ...]:
    """A sharded model and that of one process, and their handles."""
    models = made(name, **options)
    return *models, *(gradstats.attach(model, *statistics, **attachment or {}) for model in models)


def apart(stats: Handle, expected: Handle, *names: str) -> float:
    """The largest distance of these statistics, over parameters."""
    chosen = names or ("second_moment", "norms", "variance")
    return max(distance(stats.read(n)[p], expected.read(n)[p]) for n in chosen for p in expected.read(n))


def parameters_apart(model: nn.Module, alone: nn.Module) -> float:
    own = dict(alone.named_parameters())
    return max(distance(p, own[name]) for name, p in model.named_parameters())
