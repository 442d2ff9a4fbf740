"""Forwards of windows that are not gathered: all that is asked of them is how many examples reach the parameters.

Their layers compute by themselves. Hooks on what the outermost module returns tell which of these forwards a backward
pass goes through, and the hooks on parameters whom it reaches: a call a parameter, where every layer's own hooks take
many. So it is in one process, outside of compiled graphs; elsewhere every layer tells for itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from gradstats.errors import CoverageError
from gradstats.lifetime import accumulator_of, in_backward, will_execute

if TYPE_CHECKING:
    from gradstats.account import Account
    from gradstats.engines.fused import FusedHandle


class Quiet:
    """The quiet forwards of one attached model."""

    title = "the model"  # in errors, where a leaf has its own

    def __init__(self, handle: FusedHandle):
        self.handle = handle
        self.under_way = False
        self.reached: dict[int, int] = {}  # examples by generation, of those that the backward pass goes through
        self._last: tuple[int, int] | None = None  # generation and examples of the last forward, if it was a quiet one
        self._task = -1  # the graph task that accumulates gradients, and was begun with all that are reached

    @property
    def active(self) -> bool:
        """Whether a quiet forward is under way, or a part of one is computed again in a backward pass."""
        return self.under_way or (bool(self.reached) and in_backward())

    def enter(self, examples: int) -> None:
        """An outermost call begins."""
        lifetime = self.handle.lifetime
        self._last, self.under_way = None, False
        if lifetime.turns.gathers or in_backward() or not (self.handle.shards is None and self.handle.exchange is None):
            return
        trainable = [account for account in lifetime.accounts if account.trainable]
        if not all(isinstance(account.tensor, nn.Parameter) for account in trainable):  # under functional_call
            return
        for account in trainable:
            account.follow()
        self._last, self.under_way = (lifetime.begin_forward(), examples), True

    def follow(self, output: Any) -> None:
        """It has ended, and returns this."""
        if self._last is None:
            return
        generation, n = self._last

        def reach(gradient: Tensor) -> None:
            self.handle.lifetime.watch()
            self._task = -1  # from here on with these examples too
            if self.reached.setdefault(generation, n) != n:
                raise CoverageError(
                    f"two calls of {self.title} before one backward pass had {self.reached[generation]} and {n} "
                    f"examples. If they saw different ones, say so with stats.new_examples() between them"
                )

        for o in [output] if isinstance(output, Tensor) else tree_leaves(output):
            if isinstance(o, Tensor) and o.grad_fn is not None:
                o.register_hook(reach)

    def arrives(self, account: Account) -> bool:
        """Is the gradient that reaches a parameter that of quiet forwards, or of the last one by another way than
        through what it returned?"""
        lifetime = self.handle.lifetime
        if not self.reached:
            if self._last is None or self._last[0] < lifetime.first_open:
                return False
            lifetime.watch()
            self.reached = dict([self._last])
        task = torch._C._current_graph_task_id()
        if task != self._task:
            with torch.enable_grad():
                accumulator = accumulator_of(account.tensor)
            if not will_execute(accumulator):
                return True
            self._task = task
            for generation, n in self.reached.items():
                lifetime.begin_plain(self, [], n, generation)
        account.begin_use(lifetime.backward_passes, lifetime.first_open)
        account.generations.update(self.reached)
        return True
