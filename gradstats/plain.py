"""A forward that gathers nothing, in a window that is left out (`attach(..., every=k)`).

Its layers compute as if they were not attached. A hook on what each returns tells which forward a backward pass goes
through; the hooks that parameters have since they were first used see every gradient before it is accumulated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from gradstats.leaf import Leaf
    from gradstats.lifetime import Lifetime


class PlainForward:
    """Of `examples`, as far as it has come."""

    def __init__(self, lifetime: Lifetime, examples: int, generation: int):
        self.lifetime, self.examples, self.generation = lifetime, examples, generation
        self.leaves: list[Leaf] = []

    def call(self, leaf: Leaf, kind: type[nn.Module], args: tuple, kwargs: dict[str, Any]) -> Any:
        """The layer's own forward, of the class `kind`."""
        output = kind.forward(leaf.module, *args, **kwargs)
        if torch.is_grad_enabled():  # not in the first forward of reentrant checkpointing; the recomputation has hooks
            self.leaves.append(leaf)
            for o in [output] if isinstance(output, Tensor) else tree_leaves(output):
                if isinstance(o, Tensor) and o.grad_fn is not None:
                    o.grad_fn.register_prehook(self._reached)
        return output

    def _reached(self, gradients: tuple[Tensor | None, ...]) -> None:
        lifetime = self.lifetime
        if lifetime.started and lifetime.current == self.generation:
            return
        if any(account.accumulates() for leaf in self.leaves for account in leaf.accounts.values()):
            lifetime.begin_plain(self.leaves[-1], self.examples, self.generation)
