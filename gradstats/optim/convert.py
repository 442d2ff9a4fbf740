"""torch's optimizers as ours and back, in the middle of training too."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from gradstats.errors import GradstatsError
from gradstats.optim.base import ExampleOptimizer
from gradstats.optim.counterparts import PAIRS, Group, pair_of
from gradstats.sums import accumulation_dtype

# Options with which the trajectory of a converted state goes on.
CONTINUING = {"compiled", "max_norm"}


def from_torch(optimizer: Optimizer, batch_size: int, **options: Any) -> ExampleOptimizer:
    """The batch-size-invariant optimizer of the same trajectory at batches of `batch_size`, whatever came before.

    It has the same parameters in the same groups with their options, and takes over the state. torch.optim.SGD,
    RMSprop, Adam and AdamW have one; coupled weight decay stays coupled.

    Arguments:
        batch_size: the batch size at which the optimizer was tuned and has run so far.
        options: of ours that torch's has not: compiled, max_norm, and before the first step those that change the
            trajectory, such as reference_batch_size.

    A learning-rate scheduler changes the optimizer that it was made for: make another. torch.optim.SGD does not
    count its steps: set group["examples"] for a schedule to continue.

    Raises: GradstatsError for an optimizer or options without a counterpart.
    """
    pair = next((pair for pair in PAIRS if type(optimizer) in pair.theirs), None)
    if pair is None:
        known = ", ".join(kind.__name__ for pair in PAIRS for kind in pair.theirs)
        raise GradstatsError(f"no batch-size-invariant counterpart of {type(optimizer).__name__}; there is of {known}")
    for name in options:
        if name in optimizer.defaults:
            raise GradstatsError(f"{name} is taken from the optimizer: set it in its param_groups")
        if name not in CONTINUING and optimizer.state:
            raise GradstatsError(f"{name} changes the trajectory, which has begun: convert before the first step")
    groups = [
        others(group, optimizer) | own(pair.our_options(group, batch_size)) | {"params": group["params"]}
        for group in optimizer.param_groups
    ]
    ours = pair.ours(groups, **pair.our_options(optimizer.defaults, batch_size), **options)
    for group in ours.param_groups:
        for p in group["params"]:
            if state := pair.our_state(optimizer.state.get(p, {}), group):
                dtype = accumulation_dtype(p.dtype)
                ours.state[p] = {
                    name: value if name.endswith("step") else value.to(dtype, copy=True)
                    for name, value in state.items()
                }
                group["examples"] = max(group["examples"], int(state["step"]))
    return ours


def to_torch(optimizer: ExampleOptimizer, batch_size: int) -> Optimizer:
    """torch's optimizer that goes on as this one does at batches of `batch_size`.

    At batch_size = R = the batch size of tuning the trajectory is the same; elsewhere it is the closest that torch has,
    with the values of counterparts.py. A second moment that has missed gradients (attach(..., every=k, fraction=f))
    is handed out as max(s, m~^2). SGD's heavy ball is the same at any batch size, but for Nesterov's. An
    average of the slides', or the debiased one of SGD and RMSprop, is torch's once it has seen more than its horizon.

    Raises: GradstatsError for an optimizer or options without a counterpart.
    """
    pair = pair_of(optimizer)
    groups = []
    for group in optimizer.param_groups:
        more = others(group, optimizer)
        if "initial_lr" in more:  # of torch's schedulers
            initial = dict(group) | {"lr": more["initial_lr"]}
            more["initial_lr"] = pair.their_options(initial, batch_size)["lr"]
        groups.append(more | pair.their_options(group, batch_size) | {"params": group["params"]})
    theirs = pair.their_kind(groups)(groups)
    theirs.defaults |= {name: groups[0][name] for name in theirs.defaults if name in groups[0]}
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state.get(p, {})
            if state and int(state["step"]) > 0:
                theirs.state[p] = {
                    name: value if name == "step" else value.to(p.dtype, copy=True)
                    for name, value in pair.their_state(state, group, batch_size).items()
                }
    return theirs


def own(options: dict[str, Any]) -> dict[str, Any]:
    """With a tensor lr of its own: schedules change it in place."""
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in options.items()}


def others(group: Group, optimizer: Optimizer) -> dict[str, Any]:
    """What a group has beside its options, such as a name."""
    return {name: value for name, value in group.items() if name not in (*optimizer.defaults, "params")}
