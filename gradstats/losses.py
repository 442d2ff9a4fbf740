"""The losses of single examples, and the loss that they make."""

from __future__ import annotations

from torch import Tensor

from gradstats.errors import GradstatsError


def reduced(losses: Tensor, loss_reduction: str) -> Tensor:
    """The mean or the sum (), of losses (B,). Raises: GradstatsError for what is not one loss an example."""
    if not isinstance(losses, Tensor):
        raise GradstatsError(f"losses are a tensor (B,), one an example, not {type(losses).__name__}")
    if losses.dim() == 0:
        raise GradstatsError(
            "the losses are reduced already: stats.backward takes one an example (B,) and reduces them as "
            "loss_reduction says. Compute them with reduction='none'"
        )
    if losses.dim() > 1:
        raise GradstatsError(
            f"losses of shape {tuple(losses.shape)} are not one an example: reduce them over all other dimensions than "
            f"the examples' first, losses.flatten(1).mean(1)"
        )
    if not len(losses):
        raise GradstatsError("there are no losses: this batch has no examples")
    if not losses.requires_grad:
        raise GradstatsError(
            "the losses depend on no parameter: they were detached, or computed under torch.no_grad(). Give them as "
            "they were computed"
        )
    return losses.mean() if loss_reduction == "mean" else losses.sum()
