"""A forward that gathers nothing, in a window that is left out (`attach(..., every=k)`).

Its layers compute as if they were not attached. A hook on what each returns tells which forward a backward pass goes
through; the hooks that parameters have since they were first used see every gradient before it is accumulated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from gradstats.graph import will_accumulate

if TYPE_CHECKING:
    from gradstats.account import Account
    from gradstats.leaf import Leaf
    from gradstats.lifetime import Lifetime


class PlainForward:
    """Of `examples`, as far as it has come since others might have been declared new."""

    def __init__(self, lifetime: Lifetime, examples: int, generation: int):
        self.lifetime, self.examples, self.generation = lifetime, examples, generation
        self._leaf: Leaf | None = None
        self._used: list[tuple[Account, Tensor]] = []
        self._elsewhere = -1  # a graph task that accumulates into none of these

    def call(self, leaf: Leaf, kind: type[nn.Module], args: tuple, kwargs: dict[str, Any]) -> Any:
        """The layer's own forward, of the class `kind`."""
        for account in leaf.accounts.values():
            account.follow_plainly()
        output = kind.forward(leaf.module, *args, **kwargs)
        if torch.is_grad_enabled():  # not in the first forward of reentrant checkpointing; the recomputation has hooks
            self._leaf = leaf
            self._used += [(a, a.subject) for a in leaf.accounts.values() if a.subject is not None]
            for o in [output] if isinstance(output, Tensor) else tree_leaves(output):
                if isinstance(o, Tensor) and o.grad_fn is not None:
                    # A view gets another node when it is changed in place; what it is a view of keeps its own.
                    node = o.grad_fn if o._base is None else o._base.grad_fn or o.grad_fn
                    node.register_prehook(self._reached)
        return output

    def _reached(self, gradients: tuple[Tensor | None, ...]) -> None:
        lifetime, task = self.lifetime, torch._C._current_graph_task_id()
        if (lifetime.started and lifetime.reached is self) or task == self._elsewhere:
            return
        if not any(will_accumulate(p) for _, p in self._used):
            self._elsewhere = task
            return
        assert self._leaf is not None
        lifetime.begin_plain(self._leaf, self.examples, self.generation)
        lifetime.reached = self
        for account, p in self._used:
            if account.subject is not p and will_accumulate(p):  # its hooks are on another one by now
                lifetime.use_plainly(account)
