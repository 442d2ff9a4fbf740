"""Statistics of every k-th window, `attach(..., every=k)`: of the first one and every k-th after it.

A window is what p.grad accumulates until it is None again. All others cost what plain torch does (plain.py), and have
no statistics.
"""

from __future__ import annotations

import weakref
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

if TYPE_CHECKING:
    from gradstats.lifetime import Lifetime


class Turns:
    """Whose turn it is to be gathered: the first window's, and that of every k-th after it.

    A forward decides before it is known whether its backward pass goes on with the window or begins another one. It
    begins another once an optimizer has stepped or the gradients are None. Where that was foretold wrongly, and the
    backward passes of a window differ, the window counts as not gathered.
    """

    def __init__(self, every: int):
        self.every = every
        self.gathers = True  # forwards from here on
        self.goes_on = False  # as far as is known, they go on with the window
        self._gathered = True  # the window, as its first backward pass would have it
        self._age = 0  # windows since the last one that was gathered

    def begin(self, gathers: bool) -> None:
        """A window begins, with a backward pass that gathers or does not."""
        self._gathered = gathers
        self._age = 0 if gathers else self._age + 1

    def close(self) -> None:
        """A backward pass has ended."""
        self.goes_on = True
        self.gathers = self._gathered or self._age >= self.every  # overdue: ends of windows are not noticed

    def end(self) -> None:
        """The window has ended."""
        self.goes_on = False
        self.gathers = self._age + 1 >= self.every


# Lifetimes that want to know of optimizers' steps.
_waiting: weakref.WeakSet[Lifetime] = weakref.WeakSet()


def tell_of_steps(lifetime: Lifetime) -> None:
    """From here on, an optimizer's step on its parameters ends the window."""
    _waiting.add(lifetime)
    _hook()


@cache
def _hook() -> Any:
    return register_optimizer_step_post_hook(_stepped)


def _stepped(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if torch.compiler.is_compiling():
        return
    for lifetime in list(_waiting):
        one = next((account.parameter for account in lifetime.accounts if account.generations), None)
        if any(p is one for group in optimizer.param_groups for p in group["params"]):
            lifetime.turns.end()
