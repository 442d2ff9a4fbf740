"""Probing forwards: a model's own forward on some rows of a batch, in which every call of a leaf is noted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence
from torch.utils._pytree import tree_leaves, tree_map, tree_unflatten

from gradstats.arguments import Arguments
from gradstats.distributed.lockstep import Lockstep
from gradstats.errors import CoverageError, GradstatsError
from gradstats.evidence import EXAMPLES, nudge
from gradstats.findings import PACKED, Visit
from gradstats.layout import NEW, ONE, Layout
from gradstats.rules import Composite, fallback
from gradstats.watch import FunctionalUses, reached, undisturbed

if TYPE_CHECKING:
    from gradstats.account import Account
    from gradstats.engines.fused import FusedHandle
    from gradstats.leaf import Leaf

NOT_NUDGED = -1  # repeated for every example, and the same for all


class CouldNotRun(CoverageError):
    """The model raised something of its own in a probing forward."""


class FunctionalUse(NamedTuple):
    """A parameter is consumed outside of the leaf that serves it."""

    function: str
    account: Account
    callers: tuple[nn.Module, ...]  # modules under way, outermost first


class Oddity(NamedTuple):
    """A call of a leaf that its rule does not understand."""

    leaf: Leaf
    callers: tuple[nn.Module, ...]
    why: str


class Forwards:
    """Runs `module` on rows of the arguments of one call, leaving no trace on the model."""

    def __init__(self, handle: FusedHandle, module: nn.Module, arguments: Arguments, within: bool = False):
        self.handle, self.module, self.arguments = handle, module, arguments
        self.within = within  # a call of the module
        self.seed = 0
        self.shared: tuple[int, ...] = ()  # arguments that all examples share after all
        self.digested = 0  # examples of a forward of which only a number a row is kept
        self.nudged: int | None = None  # the example whose copy of what all share is changed
        self.tracked: dict[int, Account] = {}  # by id of the tensor that a layer computes with
        self._track()
        self.lockstep = None if handle.shards is None else Lockstep(handle.shards, self._idle)
        self.count = self.examples = 0  # forwards, and examples in all of them
        self.uses: list[FunctionalUse] = []
        self.oddities: list[Oddity] = []
        self._visits: list[Visit] = []
        self._callers: list[nn.Module] = []
        self._called: set[nn.Module] = set()
        self._serving: Leaf | None = None  # whose forward is under way

    def run(self, rows: Sequence[int], replaced: tuple[int, str] | None = None) -> tuple[list[Visit], list[Tensor]]:
        """One forward: its visits, and the tensors that the module returns. Raises: CouldNotRun."""
        if self.lockstep is not None:
            self.lockstep.forward()
        return self._run(rows, replaced)

    def _idle(self) -> None:
        """A forward for the sake of other ranks."""
        self._run(range(EXAMPLES), None)

    def _run(self, rows: Sequence[int], replaced: tuple[int, str] | None) -> tuple[list[Visit], list[Tensor]]:
        self._visits, self._callers, self._called = [], [], {self.module}
        self.count += 1
        self.examples += len(rows)
        args, kwargs = self.arguments.take(rows, replaced, self.shared)
        with self._resharded(), undisturbed(self.handle.model, self.seed), self._watching():
            output = self._forward(*args, **kwargs)
        outputs = [o for o in tree_leaves(output) if isinstance(o, Tensor)]
        self._find_hidden_uses(outputs)
        return self._visits, [o.detach() for o in outputs]

    def run_plainly(self) -> None:
        """The call as it is: a model that fails with its whole batch too fails with its own error."""
        args, kwargs = tree_unflatten(self.arguments.values, self.arguments.spec)
        with undisturbed(self.handle.model, self.seed), self.handle.probed_by(self):
            self._forward(*args, **kwargs)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        """Within a call, what others have put around the instance's forward is active already; to enter it again may
        not leave it as it was: Accelerate puts one autocast around it, which remembers one state."""
        if self.handle.shards is not None and not self.within:  # whose parameters come with its hooks
            return self.module(*args, **kwargs)
        forward = partial(type(self.module).forward, self.module) if self.within else self.module.forward
        return forward(*args, **kwargs)

    @contextmanager
    def _resharded(self) -> Iterator[None]:
        """Whole parameters are gathered inside, and not kept: some are noisy there."""
        shards = self.handle.shards
        if shards is not None:
            shards.reshard(but=self.under_way)
        try:
            yield
        finally:
            if shards is not None:
                shards.reshard(but=self.under_way)

    def gathered(self, module: nn.Module) -> AbstractContextManager[None]:
        """Inside, the module can be called although no forward is under way."""
        return nullcontext() if self.lockstep is None else self.lockstep.gathered(module, self.under_way)

    @property
    def under_way(self) -> nn.Module | None:
        """The module whose call this is, unless it comes ahead of one."""
        return self.module if self.within else None

    def _track(self) -> None:
        self.tracked.update({id(a.tensor): a for a in self.handle.accounts.values() if a.trainable})

    @contextmanager
    def _watching(self) -> Iterator[None]:
        try:
            with self.handle.probed_by(self), torch.enable_grad(), FunctionalUses(self.tracked, self._note_use):
                yield
        except GradstatsError:
            raise
        except Exception as error:
            # Ranks must run the same forwards, and FSDP does not recover from one that was cut short.
            kind = CouldNotRun if self.handle.shards is None else CoverageError
            raise kind(
                f"the probe could not run {type(self.module).__name__} on a few examples of the batch "
                f"({type(error).__name__}: {error}). If its arguments have the examples elsewhere than in the first "
                f"dimension, say where: attach(model, example_dims=...). A state of the batch's size that is kept "
                f"between calls must be an argument of the call."
            ) from error

    # What attached modules call

    @contextmanager
    def calling(self, module: nn.Module) -> Iterator[None]:
        """Around the forward of a module that is no leaf."""
        if self.handle.shards is not None:
            self._track()
        self._callers.append(module)
        self._called.add(module)
        try:
            yield
        finally:
            self._callers.pop()

    def visit(self, leaf: Leaf, kind: type[nn.Module], args: tuple, kwargs: dict[str, Any]) -> Any:
        """A leaf's call: the module's own forward, noted."""
        if self.handle.shards is not None:
            self._track()
        callers, serving = tuple(self._callers), self._serving
        call, inputs, key = None, [], None
        self._serving = leaf
        try:
            if leaf.rule is None:
                call = fallback.OverExamples(leaf.module, kind, *tree_map(kept, (args, kwargs)))
                inputs, key = call.flat, call.key
            elif issubclass(leaf.rule, Composite):
                given = tree_leaves((args, kwargs), is_leaf=lambda v: isinstance(v, PackedSequence))
                key = PACKED if isinstance(given[0], PackedSequence) else None
                inputs = [unpacked(v) if isinstance(v, PackedSequence) else v for v in given]
            else:
                try:
                    inputs = list(leaf.bound(args, kwargs))
                except CoverageError as error:
                    self.oddities.append(Oddity(leaf, callers, f"is called otherwise than its rule expects: {error}"))
                key = tuple(x.dim() if isinstance(x, Tensor) else None for x in inputs)
            layouts = leaf.layouts.get(key) if self.nudged is not None else None
            if layouts is not None and call is None and any(layout and layout.repeats for layout in layouts):
                args, kwargs = tree_map(lambda v: repeated(v, NEW in layouts), (args, kwargs))
            output = kind.forward(leaf.module, *args, **kwargs)
            if layouts is not None:
                output = self._nudge(output, layouts, call)
        finally:
            self._serving = serving
        outputs = [kept(o) for o in tree_leaves(output) if isinstance(o, Tensor)] if call is not None else []
        if self.digested:
            places = leaf.layouts.get(key, ())
            inputs = [digest(x, layout, self.digested) for x, layout in zip(inputs, places, strict=False)]
        self._visits.append(Visit(leaf, key, [kept(x) for x in inputs], outputs, callers, call))
        return output

    def _nudge(self, output: Any, layouts: Sequence[Layout | None], call: fallback.OverExamples | None) -> Any:
        """What all examples share, repeated for each, and changed for one of them."""
        example = self.nudged or 0
        if call is None:
            return nudge(output, example) if ONE in layouts or NEW in layouts else output
        known = iter(layouts[len(call.flat) :])

        def repeat(o: Any) -> Any:
            if not isinstance(o, Tensor) or next(known) != ONE:
                return o
            return nudge(o.expand(EXAMPLES, *o.shape[1:]), example)

        return tree_map(repeat, output)

    # Uses of parameters

    def _note_use(self, function: str, account: Any) -> None:
        if self._serving is None or account not in self._serving.accounts.values():
            self.uses.append(FunctionalUse(function, account, tuple(self._callers)))

    def _find_hidden_uses(self, outputs: Sequence[Tensor]) -> None:
        """Parameters that the outputs depend on although no leaf of theirs was called: a custom autograd.Function took
        them, which no TorchFunctionMode sees."""
        served = {account for visit in self._visits for account in visit.leaf.accounts.values()}
        for parameter in reached(outputs) & self.tracked.keys():
            if self.tracked[parameter] not in served:
                callers = sorted(self._called, key=lambda module: -len(list(module.modules())))
                self.uses.append(FunctionalUse("an autograd.Function", self.tracked[parameter], tuple(callers)))


def repeated(value: Any, in_front: bool) -> Any:
    """What all examples share, once for each."""
    if not isinstance(value, Tensor) or not (in_front or value.shape[:1] == (1,)):
        return value
    return (NEW if in_front else ONE).rows(value, EXAMPLES)


def digest(x: Any, layout: Layout | None, n: int) -> Tensor | None:
    """A number a row of x, which tells whether the row has changed."""
    if not isinstance(x, Tensor) or layout is None or not layout.fits(x, n):
        return None
    if layout.new:
        return None
    rows = layout.rows(x.detach(), n).flatten(1) if x.dim() > 1 else x.detach().unsqueeze(1)
    rows = rows if rows.is_floating_point() else rows.double()
    return rows @ torch.arange(1, rows.shape[1] + 1, device=x.device).cos().to(rows.dtype)


def kept(value: Any) -> Any:
    """A tensor without its graph."""
    return value.detach().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


def unpacked(sequences: PackedSequence) -> Tensor:
    """One row an example (n, i), in the order from before they were packed."""
    return pad_packed_sequence(sequences, batch_first=True)[0].sum(1)
