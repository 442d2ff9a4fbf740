"""Which examples the statistics count.

Statistics live and die with p.grad: a backward pass that finds the gradients None (or zeroed) starts a new window, one
that finds them set accumulates. Only examples that are backpropagated count. Forwards between the same two backward
passes share a generation; a layer may be used once in a generation, since contributions of the same example must be
summed before squaring, and a second use cannot tell whose example it saw.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.variable import Variable
from torch.utils._pytree import tree_leaves

from gradstats.errors import CoverageError, LifetimeError
from gradstats.rules.registry import refuse_coupling

if TYPE_CHECKING:
    from gradstats.account import Account
    from gradstats.leaf import Leaf


class Lifetime:
    """The current window of one attached model, and what is under way."""

    def __init__(self, accounts: list[Account], batch_norms: list[nn.Module]):
        self.accounts = accounts
        self.batch_norms = batch_norms  # which may be switched to training at any time
        self.sizes: dict[int, int] = {}  # generation -> examples backpropagated, in this window
        self.generation = 0
        self.first_open = 0  # the first generation after the last backward pass
        self.backward_passes = 0
        self.started = False  # a leaf has been reached in the backward pass under way
        self.current = 0  # the generation that it is going through
        self._tasks: set[int] = set()  # its graph tasks, nested ones included
        self._ended: set[int] = set()  # those of them that have ended
        self._suspicions: list[tuple[int, Account, CoverageError]] = []
        self._inside = False  # the model's own forward is under way
        self._batch: int | None = None  # leading dimension of the model's first input

    # Forward

    def enter(self, args: Any, kwargs: Any) -> None:
        """The model's forward begins: its first tensor tells the number of examples."""
        if not torch.is_grad_enabled():
            return
        for module in self.batch_norms:
            refuse_coupling(module)
        self._inside = True
        tensors = tensors_of(args, kwargs)
        self._batch = tensors[0].shape[0] if tensors else None

    def leave(self) -> None:
        self._inside = False

    def begin_forward(self) -> int:
        """The generation of a leaf's call."""
        if in_backward():  # recomputed under checkpointing: this pass lasts until the task that asked for it ends
            self._watch()
            return self.current if self.started else self.generation
        if self._tasks:  # a backward pass was cut short by an exception
            self._close()
        return self.generation

    def examples(self, leaf: Leaf, x: Tensor) -> tuple[Tensor, int]:
        """x (n, ...) with the number of examples; position ids (1, t) that the batch shares are expanded."""
        batch = self._batch if self._inside or in_backward() else None
        n = x.shape[0]
        if n == 0:
            raise CoverageError(f"{leaf.title} got a batch without examples, of shape {tuple(x.shape)}: skip it")
        if batch is None or n == batch:
            return x, n
        if n == 1 and x.dim() > 1 and not x.is_floating_point():
            return x.expand(batch, *x.shape[1:]), batch
        if not self._inside:  # recomputed after another forward: `begin_backward` compares the sizes
            return x, n
        raise CoverageError(
            f"{leaf.title} got an input of shape {tuple(x.shape)}, but the model's batch has {batch} examples: its "
            f"first dimension must run over the examples. Keep that dimension in front (do not flatten positions into "
            f"it), or use attach(model, engine='vmap')."
        )

    def new_examples(self) -> None:
        self.generation += 1

    # Backward

    def begin_backward(self, title: str, accounts: list[Account], n: int, generation: int) -> None:
        """Called once a use of parameters, before their gradients are accumulated; `title` names their module."""
        self._watch()
        if not self.started:
            self.started = True
            self.backward_passes += 1
            for account in self.accounts:
                account.begin_pass()
            if all(account.fresh for account in self.accounts if account.trainable):
                self.zero()
        self.current = generation
        size = self.sizes.setdefault(generation, n)
        if size != n:
            raise CoverageError(
                f"{title} saw {n} rows where the layers before it in this backward pass saw {size}: the first "
                f"dimension of every layer must run over the examples. Use attach(model, engine='vmap')."
            )
        for account in accounts:
            account.begin_use(self.backward_passes, self.first_open)
            if generation in account.generations:
                raise LifetimeError(
                    f"{title} was used twice for one backward pass, or one use of it was backpropagated twice: "
                    f"contributions of the same example must be summed before squaring. If the forwards saw different "
                    f"examples, say so with stats.new_examples() between them; if a layer is shared, use "
                    f"attach(model, engine='vmap')."
                )
            account.generations.add(generation)

    def suspect(self, account: Account, error: CoverageError) -> None:
        """A gradient came from outside of its layer: an error if it goes beside statistics of the same pass, and none
        of torch.autograd.grad, which gathers no statistics."""
        self._suspicions.append((torch._C._current_graph_task_id(), account, error))

    def zero(self) -> None:
        self.sizes.clear()
        for account in self.accounts:
            account.reset(first=0)

    def _watch(self) -> None:
        """Notes the graph task that runs; when all noted ones have ended, so has the backward pass.

        Reentrant checkpointing runs a backward pass within another: its end is not the end of the outer one.
        """
        task = torch._C._current_graph_task_id()
        if task not in self._tasks:
            self._tasks.add(task)
            Variable._execution_engine.queue_callback(lambda: self._end(task))

    def _end(self, task: int) -> None:
        self._tasks.discard(task)
        self._ended.add(task)
        if not self._tasks:
            self._close()

    def _close(self) -> None:
        errors = [e for task, account, e in self._suspicions if task in self._ended and account.generations]
        self._tasks.clear()
        self._ended.clear()
        self._suspicions.clear()
        self.started = False
        self.generation += 1
        self.first_open = self.generation
        if errors:
            raise errors[0]


def tensors_of(args: Any, kwargs: Any) -> list[Tensor]:
    return [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.dim() > 0]


def in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
