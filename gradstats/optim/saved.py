"""A saved state put back: what torch would not notice, and what it would load in another dtype."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradstats.errors import GradstatsError

if TYPE_CHECKING:
    from gradstats.optim.base import ExampleOptimizer


# In a saved group: what the state of its parameters holds, by name. Distributed checkpointing loads only what the state
# holds already, and says nothing of the rest.
HELD = "held"


def with_held(saved: dict[str, Any]) -> dict[str, Any]:
    """A state with the names of what it holds."""
    groups = [group | {HELD: names_of(saved, group)} for group in saved["param_groups"]]
    return saved | {"param_groups": groups}


def names_of(saved: dict[str, Any], group: dict[str, Any]) -> str:
    return " ".join(sorted({name for i in group["params"] for name in saved["state"].get(i, {})}))


def check_saved(optimizer: ExampleOptimizer, saved: dict[str, Any]) -> None:
    """Raises: GradstatsError for the state of another kind of optimizer, or of other parameters, or a part of one."""
    if any("batch_size" not in group for group in saved["param_groups"]):
        raise GradstatsError(
            "this state is of an optimizer that does not count examples: load it into one of its own kind, and "
            "convert that, gradstats.optim.from_torch(optimizer, batch_size)"
        )
    for group in saved["param_groups"]:
        if missing := sorted({*group.pop(HELD, "").split()} - {*names_of(saved, group).split()}):
            raise GradstatsError(
                f"the state that was saved holds {missing} too, and was loaded without: torch.distributed.checkpoint "
                f"leaves out what an optimizer does not hold yet. Before the state to load into is made, call "
                f"optimizer.allocate(batch_size=...) with the batch size of the training, or take a step of it"
            )
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for i, p in zip(saved_ids(saved), parameters, strict=False):
        for key, value in saved["state"].get(i, {}).items():
            if isinstance(value, Tensor) and value.dim() > 0 and value.shape != p.shape:
                raise GradstatsError(
                    f"{key!r} {tuple(value.shape)} was saved for another parameter than one of shape "
                    f"{tuple(p.shape)}: parameters are told apart by their order"
                )


def restore(optimizer: ExampleOptimizer, saved: dict[str, Any]) -> None:
    """Once torch has loaded it: every tensor in the dtype in which it was saved, averages on their parameter's device,
    and what decides scalars on the CPU."""
    parameters = [(p, group) for group in optimizer.param_groups for p in group["params"]]
    for i, (p, group) in zip(saved_ids(saved), parameters, strict=True):
        on_cpu = optimizer.update(group, math.inf, {}).numbers  # which decide scalars, as ages do
        for key, value in saved["state"].get(i, {}).items():
            if key.endswith("step") or key in on_cpu:
                optimizer.state[p][key] = value.detach().clone().to("cpu")
            elif isinstance(value, Tensor):
                like = p if value.shape == p.shape else value
                optimizer.state[p][key] = torch.empty_like(like, dtype=value.dtype, device=p.device).copy_(value)


def saved_ids(saved: dict[str, Any]) -> list[int]:
    """Of parameters, in their order."""
    return [i for group in saved["param_groups"] for i in group["params"]]
