"""What an optimizer's values come to at other batch sizes, as a table."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from gradstats.errors import GradstatsError
from gradstats.optim.adascale import AdaScale
from gradstats.optim.base import ExampleOptimizer
from gradstats.optim.counterparts import Group, in_torchs_units, kept
from gradstats.optim.moment import reference_of
from gradstats.optim.rmsprop import BatchInvariantRMSprop
from gradstats.optim.sgd import BatchInvariantSGD
from gradstats.sums import accumulation_dtype

DECAYS = ("betas", "momentum", "alpha", "noise_beta")
ADDING_UP = (BatchInvariantSGD, BatchInvariantRMSprop, AdaScale)  # lr is that of one push; others average
SHOWN = ("gain", "lr", *DECAYS, "dampening", "eps", "weight_decay")


def describe(optimizer: ExampleOptimizer, *batch_sizes: float) -> str:
    """The optimizer's values, group by group; at the batch size of tuning if no other is given.

    lr, betas, ...   those that torch's optimizer would have, at mu^2 + sigma^2/B dominated by noise (counterparts.py);
                     of an optimizer that torch has not, those of its step
    lr an example    lr / batch_size; where a velocity adds it up, in total
    horizon          B / (1 - beta), the examples that an average remembers, for each decay
    state            all tensors shaped like parameters
    """
    lines = [f"{type(optimizer).__name__}, {optimizer.path}"]
    for i, group in enumerate(optimizer.param_groups):
        elements = sum(p.numel() for p in group["params"])
        lines.append(f"\ngroup {i}, {elements:,} elements")
        lines += aligned(rows(optimizer, group, batch_sizes or (group["batch_size"],)))
    return "\n".join(lines)


def rows(optimizer: ExampleOptimizer, group: Group, batch_sizes: tuple[float, ...]) -> list[list[Any]]:
    found = [["tuned at B", group["batch_size"]], ["lr an example", lr_of_an_example(optimizer, group)]]
    if "source" in group:
        found.append(["second moment of", group["source"]])
    if "reference_batch_size" in group and group.get("source") != "squared_batch_mean":
        found.append(["R", reference_of({"source": None} | group)])
    if "average" in group:
        found.append(["average", group["average"]])
    units, columns = values(optimizer, group, batch_sizes)
    found.append([f"{units} at B", *batch_sizes])
    for name in SHOWN:
        if name in columns[0]:
            found.append([name, *(column[name] for column in columns)])
    for name in DECAYS:
        if name in columns[0]:
            pairs = zip(batch_sizes, columns, strict=True)
            found.append([f"horizon of {name}", *(horizon(b, column[name]) for b, column in pairs)])
    return [*found, ["state, bytes", *(state_bytes(optimizer, group, b) for b in batch_sizes)]]


def values(optimizer: ExampleOptimizer, group: Group, batch_sizes: Iterable[float]) -> tuple[str, list[dict[str, Any]]]:
    """Of which optimizer, and its values at each batch size."""
    try:
        found = [in_torchs_units(optimizer, group, b) for b in batch_sizes]
        return f"torch.optim.{found[0][0]}", [options for _, options in found]
    except GradstatsError:
        own = {name: group[name] for name in SHOWN if name in group}
        return "a step", [own | of_step(group, b) | optimizer.values_at(group, b) for b in batch_sizes]


def of_step(group: Group, b: float) -> dict[str, Any]:
    k, kind = b / group["batch_size"], group.get("average", "")
    return {"lr": k * group["lr"]} | {
        name: each(lambda beta: kept(kind, beta, k), group[name]) for name in DECAYS if name in group
    }


def lr_of_an_example(optimizer: ExampleOptimizer, group: Group) -> float:
    lr = float(group["lr"]) / group["batch_size"]
    if isinstance(optimizer, ADDING_UP):
        lr *= (1 - group.get("dampening", 0.0)) / (1 - group["momentum"])
    return lr


def horizon(b: float, beta: Any) -> Any:
    return each(lambda beta: b / (1 - beta) if beta < 1 else float("inf"), beta)


def state_bytes(optimizer: ExampleOptimizer, group: Group, b: float) -> int:
    """Of the group, once there has been a batch of b examples."""
    total = 0
    for p in group["params"]:
        buffers = optimizer.update(group, b, optimizer.state.get(p, {})).buffers
        total += len(buffers) * p.numel() * accumulation_dtype(p.dtype).itemsize
    return total


def each(function: Callable[[float], float], value: Any) -> Any:
    return tuple(map(function, value)) if isinstance(value, (tuple, list)) else function(value)


def text(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return ", ".join(map(text, value))
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{float(value):.6g}" if isinstance(value, (float, Tensor)) else str(value)


def aligned(table: Iterable[list[Any]]) -> list[str]:
    cells = [[text(cell) for cell in row] for row in table]
    widths = [max(len(row[i]) for row in cells if i < len(row)) for i in range(max(map(len, cells)))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=False)).rstrip() for row in cells]
