"""Which examples the statistics count.

Statistics live and die with p.grad: a backward pass that finds the gradients None (or zeroed) starts a new window, one
that finds them set accumulates. Only examples that are backpropagated count. Forwards between the same two backward
passes share a generation; one forward of a generation may use a layer, since contributions of the same example must be
summed before squaring, and a second forward cannot tell whose examples it saw. Within a forward a layer may be used
several times.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.autograd.variable import Variable

from gradstats.checkpointing import Checkpointing
from gradstats.distributed.rows import join_rows
from gradstats.errors import CoverageError, LifetimeError
from gradstats.graph import in_backward, saves_through_hooks
from gradstats.plain import PlainForward
from gradstats.sampling import Sampling
from gradstats.turns import Turns, tell_of_steps
from gradstats.uses import Uses

if TYPE_CHECKING:
    from gradstats.account import Account
    from gradstats.distributed.counts import Counts
    from gradstats.distributed.sharded import Sizes
    from gradstats.engines.fused import FusedHandle
    from gradstats.function import Use
    from gradstats.leaf import Leaf


class Lifetime:
    """The current window of one attached model, and what is under way."""

    def __init__(self, handle: FusedHandle, accounts: list[Account], sampling: Sampling):
        self.handle, self.shards, self.accounts, self.sampling = handle, handle.shards, accounts, sampling
        self.turns = Turns(sampling.every)
        if sampling.every > 1:
            tell_of_steps(self)
        self.sizes: dict[int, int] = {}  # generation -> examples backpropagated, in this window
        self.of_ranks: dict[int, Sizes] = {}  # the same of every rank, where the model is sharded
        self.plain: set[int] = set()  # those of these generations that were not gathered
        self.elsewhere = 0  # examples of other ranks in this window
        self.told = 0  # the first generation that other ranks have not been told of
        self._drawn: dict[int, Tensor] = {}  # by generation, the examples drawn in the backward pass under way
        self.generation = 0
        self.first_open = 0  # the first generation after the last backward pass
        self.backward_passes = 0
        self.cut_short = False  # a backward pass of a sharded model, by an exception
        self.started = False  # a leaf has been reached in the backward pass under way
        self.returned = False  # and one of them has returned gradients, which autograd may have accumulated
        self._begins = False  # it is the first through its generation
        self.broken = False  # a pass of this window was cut short, in the midst of its gradients
        self.current = 0  # the generation that it is going through
        self._gathers = True  # whether it gathers
        self._plainly = False  # whether it goes through a call that gathers nothing, as one without examples does not
        self._tasks: set[int] = set()  # its graph tasks, nested ones included
        self._ended: set[int] = set()  # those of them that have ended
        self._suspicions: list[tuple[int, Account, CoverageError]] = []
        self.root: nn.Module | None = None  # the outermost module whose call is under way
        self.first: Tensor | None = None  # its first tensor, where it is compiled
        self._batch: int | None = None  # examples of the last outermost call
        self._batch_after: int | None = None  # what that is when the call has ended
        self.checkpointing = Checkpointing()
        self.plain_forward: PlainForward | None = None  # that is under way
        self.reached: PlainForward | None = None  # that the backward pass goes through
        self._uses: dict[Account, tuple[Uses, Tensor | None]] = {}  # by the forward under way, with the first's link
        self._recomputed: dict[Account, tuple[Uses, Tensor | None]] = {}  # the same in a backward pass

    # Forward

    def look_ahead(self) -> None:
        """Before an outermost call: have the gradients been zeroed, so that a new window is to begin?"""
        unknown = self.turns.every > 1 and self.turns.goes_on and not in_backward()
        if unknown and any(account.fresh for account in self.accounts if account.generations):
            self.turns.end()

    def enter(self, module: nn.Module, examples: int) -> None:
        """An outermost call into the attached model begins."""
        self.checkpointing.begin(module)
        # One that is made again, or is to be, counts its own; others that are recomputed are parts of the last one.
        self._batch_after = examples if torch.is_grad_enabled() and not in_backward() else self._batch
        self.root, self._batch, self.first = module, examples, None
        if examples and not self.turns.gathers and self.shards is None:  # whose parameters are there layer by layer
            self.plain_forward = PlainForward(self, examples, self.begin_forward())

    def enter_traced(self, module: nn.Module, first: Tensor) -> None:
        """The same while Dynamo traces, for which a number that changes must be the size of a tensor."""
        self.root, self._batch, self._batch_after, self.first = module, None, None, first

    def recomputes(self, module: nn.Module) -> bool:
        """Whether a call of `module` now is an outermost one that a backward pass makes again."""
        return self.root is None and self.checkpointing.calls_again(module)

    def leave(self, module: nn.Module) -> None:
        """The call of `module` ends; not only an outermost one may say so."""
        if module is self.root:
            self.root = self.first = self.plain_forward = None
            self._batch = self._batch_after
            self._uses.clear()

    @property
    def examples(self) -> int | None:
        """How many the forward under way has, or the part of it that is recomputed in a backward pass."""
        if self.root is not None:
            return self._batch if self.first is None else self.first.shape[0]
        if in_backward():
            return self.sizes.get(self.current, self._batch) if self.started else self._batch
        return None

    def begin_forward(self) -> int:
        """The generation of a leaf's call."""
        if in_backward():  # recomputed under checkpointing: this pass lasts until the task that asked for it ends
            self._watch()
            return self.current if self.started else self.generation
        self.look_back()
        return self.generation

    def look_back(self) -> None:
        """Was the last backward pass cut short by an exception? Nothing of it counts if no gradient had come of it."""
        if not self._tasks or in_backward():
            return
        self.broken |= self.started and self.returned
        if self.started and self._begins and not self.returned:
            self.sizes.pop(self.current, None)
            for account in self.accounts:
                account.generations.discard(self.current)
        self._close()
        self.cut_short = self.shards is not None

    def check(self) -> None:
        """Raises: LifetimeError for a window in which a backward pass was cut short."""
        self.look_back()
        if self.broken:
            raise LifetimeError(
                "a backward pass was cut short by an exception, so that some gradients have its examples and others "
                "have not. Call zero_grad() and backpropagate again"
            )

    @property
    def gathers(self) -> bool:
        """Whether the forward under way does, or the part of it that is recomputed in a backward pass."""
        return self._gathers if self.started and in_backward() else self.turns.gathers

    @property
    def passes_gather(self) -> bool:
        """Whether the backward pass under way gathers, or the last one did."""
        return self._gathers

    def drawn(self, generation: int, n: int, device: torch.device) -> Tensor | None:
        """The examples that sums are over (m,), the same in every layer; None for all n of them."""
        if self.sampling.fraction == 1:
            return None
        if generation not in self._drawn:
            self._drawn[generation] = self.sampling.draw(n)
        index = self._drawn[generation]
        return None if len(index) == n else index.to(device, non_blocking=True)

    def uses_of(self, account: Account) -> tuple[Uses, Tensor | None]:
        """The uses of a parameter by the forward under way, and the link to the first of them, None for the first."""
        opened = self._open()
        if account not in opened:
            opened[account] = Uses(account.name), None
        return opened[account]

    def link(self, used: Iterable[Use], link: Tensor) -> None:
        """Keeps the link of first uses, for as long as there can be others."""
        recomputes, opened = in_backward(), self._open()
        # A link keeps its graph alive: that of a non-reentrant recomputation has only to be run, not to be kept.
        runs = recomputes and saves_through_hooks()
        for account, uses, collects in used:
            if collects and runs:
                opened.pop(account)
            elif collects and (recomputes or self.root is not None):
                opened[account] = uses, link

    def _open(self) -> dict[Account, tuple[Uses, Tensor | None]]:
        return self._recomputed if in_backward() else self._uses

    @property
    def counts(self) -> dict[int, int]:
        """Examples backpropagated in this window, by generation; over all ranks."""
        return self.sizes if self.shards is None else {g: sizes.total for g, sizes in self.of_ranks.items()}

    def new_examples(self) -> None:
        """Forwards from here on have a generation of their own."""
        self._advance()

    def _advance(self) -> None:
        self.generation += 1
        if self.plain_forward is not None:
            self.plain_forward = PlainForward(self, self.plain_forward.examples, self.generation)

    # Backward

    def _reach(self, leaf: Leaf, n: int, generation: int, gathers: bool, plainly: bool) -> None:
        """A leaf's call is reached, before gradients are accumulated."""
        if self.cut_short:
            raise LifetimeError(
                "the last backward pass was cut short by an exception, and FSDP keeps the gradients that it had not "
                "reduced, which zero_grad() does not reach: make the model anew, and load a checkpoint"
            )
        self._watch()
        if not self.started:
            self.started = True
            self.backward_passes += 1
            for account in self.accounts:
                account.returned.clear()  # of an earlier pass, cut short: nothing to compare with
            if all(account.fresh for account in self.accounts if account.trainable):
                self.zero(keeps=not gathers)
                self.turns.begin(gathers)
            elif self.turns.every > 1 and any(account.fresh for account in self.accounts if account.generations):
                self.turns.begin(gathers)  # of these parameters: the gradients of others are kept
            if self.handle.exchange is not None:
                # Other ranks may reach what this one does not; and views of a bucket share the mark of being changed.
                for account in self.accounts:
                    if account.generations:
                        account.begin_use(self.backward_passes, self.first_open)
            self.returned, self._begins = False, generation not in self.sizes
        self.current, self._gathers, self._plainly, self.reached = generation, gathers, plainly, None
        if not gathers:
            self.plain.add(generation)
        if self.shards is not None and generation not in self.sizes:
            self.of_ranks[generation] = self.shards.sizes(n)
        size = self.sizes.setdefault(generation, n)
        if size != n:
            raise CoverageError(
                f"{leaf.title} saw {n} examples where the layers before it in this backward pass saw {size}: the first "
                f"dimension of every input must run over the examples. Call the layers from one module's forward, and "
                f"attach that module."
            )

    def begin_plain(self, leaf: Leaf, n: int, generation: int) -> None:
        """The same as `begin_backward` for the leaves of a forward that gathers nothing, or for one of them."""
        self._reach(leaf, n, generation, gathers=n == 0 and self.turns.gathers, plainly=True)

    def arrives(self, account: Account) -> bool:
        """A gradient arrives at the parameter, and is not accumulated yet: of a pass that gathers nothing?"""
        if self.started and self._plainly:
            self.use_plainly(account)
        return self.started and not self._gathers

    def use_plainly(self, account: Account) -> None:
        """A gradient is to be accumulated by a call that gathers nothing."""
        self.returned = True
        account.begin_use(self.backward_passes, self.first_open)
        account.generations.add(self.current)

    def begin_backward(self, leaf: Leaf, used: Collection[Use], n: int, generation: int) -> None:
        """Called once a leaf's call, before gradients are accumulated."""
        self._reach(leaf, n, generation, gathers=True, plainly=False)
        # Now, not when the pass began: until then a hook may have set its gradient, and who is frozen has an old one.
        for account, _, _ in used:
            account.begin_use(self.backward_passes, self.first_open)
        for account, _, collects in used:
            if not collects:
                continue
            self._recomputed.pop(account, None)
            if generation in account.generations:
                raise LifetimeError(
                    f"{leaf.title} was used by two forwards before one backward pass, or one use of it was "
                    f"backpropagated twice: contributions of the same example must be summed before squaring. If the "
                    f"forwards saw different examples, say so with stats.new_examples() between them; if they saw the "
                    f"same ones, call both from the forward of one module, and attach that module."
                )
            account.generations.add(generation)

    def suspect(self, account: Account, error: CoverageError) -> None:
        """A gradient came from outside of its layer: an error if it goes beside statistics of the same pass, and none
        of torch.autograd.grad, which gathers no statistics."""
        self._suspicions.append((torch._C._current_graph_task_id(), account, error))

    @property
    def unsent(self) -> list[int]:
        """The examples of every generation that other ranks have not been told of."""
        return [size for generation, size in self.sizes.items() if generation >= self.told]

    def receive(self, counts: Counts) -> int:
        """The ranks have told each other: the last generation that is known to all."""
        generation = max(self.sizes, default=self.generation)
        self.told = generation + 1
        self.elsewhere += counts.elsewhere(counts.examples)
        if not counts.gathered:
            self.plain.add(generation)
        return generation

    def zero(self, keeps: bool = False) -> None:
        """A new window begins; one that is not gathered `keeps` the memory of sums for the next one that is."""
        self.sizes.clear()
        self.of_ranks.clear()
        self.plain.clear()
        self.elsewhere = 0
        self.broken = False
        for account in self.accounts:
            account.reset(first=0, keeps=keeps)

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
            if self.shards is not None and self.started:
                join_rows(self.shards, self.accounts, self.of_ranks)
            self._close()
            if self.handle.exchange is not None:
                self.handle.exchange.ended()

    def _close(self) -> None:
        # A recomputation notes the task of torch.autograd.grad too, which reaches no leaf that counts.
        suspicions = self._suspicions if self.started else []
        errors = [e for task, account, e in suspicions if task in self._ended and account.generations]
        self._tasks.clear()
        self._ended.clear()
        self._suspicions.clear()
        self._recomputed.clear()
        self.checkpointing.close()
        self._drawn.clear()
        if self.started:
            self.turns.close()
        self.started = False
        self._advance()
        self.first_open = self.generation
        if errors:
            raise errors[0]
