"""Checkpointing around calls from outside: the attached model as a whole, or parts of it that a loop drives.

What a backward pass recomputes is mostly a part of a forward, and has the forward's examples. A call that was itself
under checkpointing is made again as a whole, and counts its own.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from gradstats.graph import in_backward, saves_through_hooks


class Checkpointing:
    """Which modules are called again as a whole."""

    def __init__(self) -> None:
        self.evaluating = False  # an outermost call without gradients is under way
        self._waiting: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # called since the last backward pass
        self._whole: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def begin(self, module: nn.Module) -> None:
        """An outermost call begins. Is it under checkpointing: a reentrant one's first forward, without gradients, or
        one with hooks on saved tensors? What is inside of it is now a part, as is what waits inside of another."""
        if in_backward():
            return
        if self._whole:
            self._whole -= {*module.modules()} - {module}
        again = not torch.is_grad_enabled() or saves_through_hooks()
        if again and not any(inside is module for other in self._waiting - {module} for inside in other.modules()):
            self._whole.add(module)
        if torch.is_grad_enabled():
            self._waiting.add(module)

    def close(self) -> None:
        """A backward pass has ended."""
        self._waiting.clear()

    def calls_again(self, module: nn.Module) -> bool:
        """Whether a call that begins now, under no other, is one of a whole that a backward pass makes."""
        return module in self._whole and in_backward()

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """An outermost call without gradients. Inside, what reentrant checkpointing runs is not its first forward,
        though it looks like one: nothing will recompute it."""
        self.evaluating = True
        try:
            yield
        finally:
            self.evaluating = False
