"""What the ranks of a DistributedDataParallel do in tests, and one process with the examples of all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import gradstats
from experiments.gpt import GPT
from gradstats.histogram import Counts
from gradstats.optim import BatchInvariantAdam

N = 64  # examples of a problem
# Of the menu, all but those that pair examples; cosine_similarity and gram do.
STATISTICS = (
    "second_moment",
    "variance",
    "norms",
    "sign_mean",
    "abs_mean",
    "max_abs",
    "snr",
    "noise_scale",
    "histogram",
    "projection",
)
FEW = ("second_moment", "variance", "norms", "noise_scale")


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3))


def convnet() -> nn.Module:
    first = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.GELU(), nn.MaxPool2d(2))
    return nn.Sequential(first, nn.Conv2d(4, 6, 3), nn.GELU(), nn.Flatten(), nn.Linear(24, 3))


def gpt() -> nn.Module:
    """The embedding's weight is the head's too."""
    return GPT(words=11, width=8, layers=2, heads=2, positions=5, tied=True)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "mlp": (mlp, lambda: torch.randn(N, 6)),
    "convnet": (convnet, lambda: torch.randn(N, 2, 8, 8)),
    "gpt": (gpt, lambda: torch.randint(0, 11, (N, 6))),
}

Problem = tuple[nn.Module, Tensor, Tensor]


def problem(name: str = "mlp", dtype: torch.dtype = torch.float64) -> Problem:
    """The same on all ranks."""
    torch.manual_seed(0)
    make, draw = MODELS[name]
    model, x = make().to(dtype), draw()
    if name == "gpt":
        return model, x[:, :-1], x[:, 1:]
    return model, x.to(dtype), torch.randint(0, 3, (N,))


def loss_of(output: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
    return F.cross_entropy(output.flatten(0, -2), y.flatten(), reduction=reduction)


def rank_of() -> tuple[int, int]:
    return dist.get_rank(), dist.get_world_size()


def share(rows: Any, sizes: Sequence[int] | None = None) -> Any:
    """This rank's of the examples of a batch: as many as the others', or sizes[rank]."""
    rank, ranks = rank_of()
    sizes = sizes or [len(rows) // ranks] * ranks
    return rows[sum(sizes[:rank]) : sum(sizes[: rank + 1])]


def ddp_of(model: nn.Module, **options: Any) -> DistributedDataParallel:
    return DistributedDataParallel(model, bucket_cap_mb=0.0002, **options)  # several buckets


def read(stats: gradstats.Handle, statistics: Sequence[str] = STATISTICS) -> dict[tuple[str, str], Tensor]:
    """Every statistic of every parameter, and in total where there is one."""
    found = {("batch_size", ""): torch.tensor(float(stats.batch_size))}
    for name in statistics:
        entries = stats.read(name)
        found |= {(name, key): numbers(value) for key, value in entries.items()}
        if entries.has_total:
            found[name, "total"] = numbers(entries.total)
    return found


def numbers(value: Any) -> Tensor:
    """A statistic as one tensor. Of a histogram, counts by the exponent of the lower edge: the contributions of a rank
    are W times as large as those of one process, and with them the bins that they are counted in."""
    if isinstance(value, Counts):
        place = value.edges[1:-1].log2().round().long() + 200
        return torch.cat(
            [torch.zeros(400, dtype=torch.float64).index_put((place,), value.counts[1:]), value.zeros[None]]
        )
    return torch.stack(list(value)).double() if isinstance(value, tuple) else value.detach().clone()


def check_equal(found: dict[Any, Tensor], expected: dict[Any, Tensor], tolerance: float = 1e-9) -> None:
    """||a - b|| <= tolerance ||b||; or a millionth of the largest of all parameters, below which all is rounding."""
    assert found.keys() == expected.keys()
    scale: dict[str, float] = {}
    for (name, _), value in expected.items():
        scale[name] = max(scale.get(name, 0.0), float(value.norm()))
    for key, value in expected.items():
        error = float((found[key] - value).norm())
        assert error <= tolerance * max(float(value.norm()), 1e-6 * scale[key[0]]), (key, error, float(value.norm()))


def vector(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def of_one_process(name: str, batch: int = 8, **attachment: Any) -> dict[Any, Tensor]:
    """Statistics of one process after one backward pass."""
    model, x, y = problem(name)
    stats = gradstats.attach(model, *STATISTICS, **attachment)
    loss_of(model(x[:batch]), y[:batch], stats.loss_reduction).backward()
    return read(stats)


def train(model, forward, optimizer, x, y, steps=50, batch=8, part=lambda rows: rows, order=None):
    """One step on every batch; each loss is the mean over what this process sees of it."""
    for i in range(steps):
        rows = torch.arange(i * batch, (i + 1) * batch) % len(x)
        rows = rows if order is None else rows[order]
        model.zero_grad()
        loss_of(forward(part(x[rows])), part(y[rows])).backward()
        optimizer.step()
    return vector(model)


def ours(model):
    return BatchInvariantAdam(model.parameters(), lr=1e-2, batch_size=4, eps=1e-6)
