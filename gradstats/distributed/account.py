"""The account of a sharded parameter: all of it, a plain tensor, while its layer computes; a DTensor for everyone else.

Autograd accumulates into the plain tensor, from which FSDP takes the gradient: at once, or with those of later backward
passes where set_requires_gradient_sync(False) lets it wait. Sums are scattered in every backward pass; to keep them in
full would cost the memory that sharding saves.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from gradstats.account import Account
from gradstats.distributed.local import local
from gradstats.distributed.spread import DTensor
from gradstats.gradient import Left
from gradstats.sums import SUMS

if TYPE_CHECKING:
    from gradstats.distributed.sharded import Shards
    from gradstats.engines.fused import FusedHandle


class ShardedAccount(Account):
    """Of the parameter `attribute` of `module`, called `name` in the model."""

    def __init__(self, handle: FusedHandle, module: nn.Module, attribute: str, name: str, shards: Shards):
        self.shards = shards
        self.sharded: nn.Parameter = module._parameters[attribute]  # type: ignore[assignment]
        super().__init__(handle, module, attribute, name)

    def _forget(self) -> None:
        super()._forget()
        self.scattered: dict[str, Tensor] = {}  # by sum, those shaped like the parameter
        self.own: list[tuple[str, int]] = []  # by sum and generation, others that are over this rank's examples so far
        self.waiting = False  # a gradient was accumulated that FSDP has not reduced

    @property
    def parameter(self) -> nn.Parameter:
        found = self.tensor
        if isinstance(found, DTensor):  # another one after .to_empty()
            self.sharded = found
        return self.sharded

    @property
    def current(self) -> nn.Parameter | None:
        return self.parameter if self.present else None

    # Forward

    def shadow_of(self, kind: str) -> Tensor:
        known, found = self.shadows.get(kind), super().shadow_of(kind)
        if found is not known:
            scatter = weakref.WeakMethod(self._scatter)  # as `_follow` has it
            found.register_post_accumulate_grad_hook(lambda s: (alive := scatter()) and alive(kind, s))
        return found

    def _follow(self, p: nn.Parameter) -> None:
        if self.subject is None and p.grad is not None:  # older than attach
            self.waiting = self.unseen = True
        super()._follow(p)
        reduced = weakref.WeakMethod(self._reduced)
        hook = self.parameter.register_post_accumulate_grad_hook(lambda p: (alive := reduced()) and alive(p))
        self._hooks.append(hook)

    # Backward

    @torch.no_grad()
    def _scatter(self, kind: str, s: Tensor) -> None:
        assert s.grad is not None
        own, s.grad = s.grad, None
        found = self.shards.scattered(own, self.parameter, SUMS[kind])
        self.scattered[kind] = self.scattered[kind].add_(found) if kind in self.scattered else found

    def record(self, generation: int, gradient: Tensor | None, units: int, sums: dict[str, Tensor]) -> None:
        parts = {}
        for kind, value in sums.items():
            if SUMS[kind].per == "element":
                value = self.shards.scattered(value, self.parameter, SUMS[kind])
            else:
                self.own.append((kind, generation))
            parts[kind] = value
        super().record(generation, gradient, units, parts)

    def _accumulated(self, p: Tensor) -> None:
        self.waiting = True

    def _reduced(self, p: Tensor) -> None:
        self.waiting = False
        if p.grad is not None and self._explained:
            # Sampled, since torch._foreach_mul_, by which clip_grad_norm_ clips, leaves no mark on a DTensor.
            self.left = Left(p.grad, sampled=True, followed=self.handle.follows_clipping)

    # Window

    @property
    def untouched(self) -> bool:
        if self.left is None:  # FSDP has reduced nothing yet
            return self.waiting and self.parameter.grad is None
        return self.left.fits(self.parameter.grad)

    @property
    def fresh(self) -> bool:
        """The same on all ranks: what one has of a gradient may be zero."""
        if self.waiting or (gradient := self.parameter.grad) is None:
            return not self.waiting
        return not self.shards.largest(int(local(gradient).any()))

    def reset(self, first: int, keeps: bool = False) -> None:
        super().reset(first, keeps)
        self.scattered.clear()
        self.own.clear()
        self.left = None

    # Reading

    def value(self, kind: str) -> Tensor | None:
        return self.scattered.get(kind) if SUMS[kind].persistent else super().value(kind)
