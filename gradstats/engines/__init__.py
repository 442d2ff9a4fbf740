"""How per-example gradients are formed, behind one interface: engine(model, statistics, loss_reduction) -> Handle."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from gradstats.engines.opacus import OpacusHandle
from gradstats.handle import Handle


def fused(model: nn.Module, statistics: Sequence[str], loss_reduction: str) -> Handle:
    """Layer rules, and vmap leaves for modules without one."""
    handle = Handle(model, statistics, loss_reduction)
    handle.install()
    return handle


def vmap(model: nn.Module, statistics: Sequence[str], loss_reduction: str) -> Handle:
    """The whole model as one vmap leaf."""
    handle = Handle(model, statistics, loss_reduction)
    handle.install(whole=True)
    return handle


def opacus(model: nn.Module, statistics: Sequence[str], loss_reduction: str) -> Handle:
    """Opacus' GradSampleModule, independent of our rules."""
    handle = OpacusHandle(model, statistics, loss_reduction)
    handle.install()
    return handle


ENGINES: dict[str, Callable[[nn.Module, Sequence[str], str], Handle]] = {"fused": fused, "vmap": vmap, "opacus": opacus}
