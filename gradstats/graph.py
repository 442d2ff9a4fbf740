"""What autograd's engine is doing in this thread."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def in_backward() -> bool:
    """Whether it runs a backward pass."""
    return torch._C._current_graph_task_id() != -1


def backward_may_follow() -> bool:
    """Whether a backward pass may go through a forward that runs now, or through what recomputes it.

    Reentrant checkpointing runs the first forward without gradients, and what it returns must be shaped like what the
    recomputation returns: it is treated as one with gradients.
    """
    if torch.is_grad_enabled():
        return True
    # Inside of an autograd Function, as reentrant checkpointing is; torch.no_grad() leaves forward mode enabled.
    return not torch._C._is_fwd_grad_enabled() and not torch.is_inference_mode_enabled()


def transformed() -> bool:
    """Whether derivatives are taken by other means, or of other things: transforms of torch.func, and forward mode."""
    return torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0


def saves_through_hooks() -> bool:
    """Whether hooks pack what is saved for a backward pass: those of non-reentrant checkpointing, or of offloading."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def accumulator_of(leaf: Tensor) -> Any:
    """The node that adds to its gradient; gradients must be enabled. As get_gradient_edge, in a fifth of the time."""
    return leaf.view_as(leaf).grad_fn.next_functions[0][0]  # type: ignore[union-attr]


def will_accumulate(leaf: Tensor) -> bool:
    """Whether the backward pass under way reaches the leaf and adds to its gradient, unlike torch.autograd.grad."""
    if not leaf.requires_grad:
        return False
    with torch.enable_grad():
        node = accumulator_of(leaf)
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # torch.autograd.grad with respect to the leaf
        return False
