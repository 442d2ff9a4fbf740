"""The probe: a few forwards of a few examples, before the first step, in which every use of every parameter is seen.

Two sizes of the batch tell which dimension of a leaf's input runs over the examples; replacing one example at a time
tells which of its entries are that example's, and whether anything mixes examples on the way. A parameter that is used
outside of its leaf, or where no dimension runs over examples, moves the leaf's boundary up to the module that called.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence
from torch.utils._pytree import tree_leaves, tree_map

from gradstats.arguments import Arguments
from gradstats.errors import CoverageError, GradstatsError
from gradstats.evidence import EXAMPLES, Mixes, Unclear, changed_entries, layout_of, nudge, order_of
from gradstats.layout import ONE, Layout
from gradstats.rules import Composite, fallback
from gradstats.watch import FunctionalUses, undisturbed

if TYPE_CHECKING:
    from gradstats.engines.fused import FusedHandle
    from gradstats.leaf import Leaf


PACKED = "packed"  # the kind of call of a recurrent layer that has no dimension of examples


class Visit(NamedTuple):
    """One call of a leaf in a probing forward."""

    leaf: Leaf
    key: Any  # the kind of call
    inputs: list[Any]
    outputs: list[Any]  # tensors that a vmap leaf returned
    callers: tuple[nn.Module, ...]  # modules under way, outermost first
    call: fallback.OverExamples | None


class Probe:
    """What a signature of calls of one module does with its parameters."""

    def __init__(self, handle: FusedHandle, module: nn.Module, arguments: Arguments):
        self.handle, self.module, self.arguments = handle, module, arguments
        self.forwards, self.seconds = 0, 0.0
        self.visits: list[Visit] = []
        self.callers: list[nn.Module] = []
        self.serving: Leaf | None = None  # whose forward is under way
        self.moves: dict[nn.Module, str] = {}  # modules that are to become vmap leaves, and why
        self.shared: tuple[int, ...] = ()  # arguments that all examples share after all
        self.inside = set(handle.model.modules())
        self.tracked = {id(a.parameter): a for a in handle.accounts.values() if a.trainable}
        self.nudged: int | None = None  # the example whose copy of what all share is changed

    def establish(self) -> None:
        """Finds the layouts of all leaves. Raises: CoverageError if the forward mixes examples, or hides them."""
        begun = time.perf_counter()
        self._settle_arguments()
        while True:
            found = self._layouts()
            if not self.moves:
                break
            for module, why in self.moves.items():
                if not any(module in set(other.modules()) for other in self.moves if other is not module):
                    self.handle.move_up(module, why)
            self.moves = {}
        for visit, layouts in found:
            visit.leaf.layouts[visit.key] = layouts
        for account in self.handle.accounts.values():
            uses = sum(account in visit.leaf.accounts.values() for visit, _ in found)
            account.uses = max(account.uses or 0, uses)
        self.seconds = time.perf_counter() - begun

    # Forwards

    def run(self, rows: Sequence[int], replaced: int | None = None) -> tuple[list[Visit], list[Tensor]]:
        """One forward: its visits, and the tensors that the module returns."""
        self.visits, self.callers = [], []
        self.forwards += 1
        args, kwargs = self.arguments.take(rows, replaced, self.shared)
        with undisturbed(self.handle.model), self._watching():
            output = self.module.forward(*args, **kwargs)
        return self.visits, [o.detach() for o in tree_leaves(output) if isinstance(o, Tensor)]

    @contextmanager
    def _watching(self) -> Iterator[None]:
        self.handle.probing = self
        try:
            with torch.enable_grad(), FunctionalUses(self.tracked, self._functional_use):
                yield
        except GradstatsError:
            raise
        except Exception as error:
            raise CoverageError(
                f"the probe could not run {type(self.module).__name__} on a few examples of the batch "
                f"({type(error).__name__}: {error}). If its arguments have the examples elsewhere than in the first "
                f"dimension, say where: attach(model, example_dims=...)"
            ) from error
        finally:
            self.handle.probing = None

    @contextmanager
    def calling(self, module: nn.Module) -> Iterator[None]:
        """Around the forward of a module that is no leaf."""
        self.callers.append(module)
        try:
            yield
        finally:
            self.callers.pop()

    def visit(self, leaf: Leaf, kind: type[nn.Module], args: tuple, kwargs: dict[str, Any]) -> Any:
        """A leaf's call: the module's own forward, noted."""
        callers, serving = tuple(self.callers), self.serving
        call, inputs, key = None, [], None
        self.serving = leaf
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
                    self._move(leaf, callers, f"is called otherwise than its rule expects: {error}")
                key = tuple(x.dim() if isinstance(x, Tensor) else None for x in inputs)
            layouts = leaf.layouts.get(key) if self.nudged is not None else None
            if layouts is not None and call is None and ONE in layouts:
                n = EXAMPLES
                args, kwargs = tree_map(
                    lambda v: ONE.rows(v, n) if isinstance(v, Tensor) and v.shape[:1] == (1,) else v, (args, kwargs)
                )
            output = kind.forward(leaf.module, *args, **kwargs)
            if layouts is not None:
                output = self._nudge(output, layouts, call)
        finally:
            self.serving = serving
        outputs = [kept(o) for o in tree_leaves(output) if isinstance(o, Tensor)] if call is not None else []
        self.visits.append(Visit(leaf, key, [kept(x) for x in inputs], outputs, callers, call))
        return output

    def _nudge(self, output: Any, layouts: Sequence[Layout | None], call: fallback.OverExamples | None) -> Any:
        """What all examples share, repeated for each, and changed for one of them."""
        example = self.nudged or 0
        if call is None:
            return nudge(output, example) if ONE in layouts else output
        known = iter(layouts[len(call.flat) :])

        def repeat(o: Any) -> Any:
            if not isinstance(o, Tensor) or next(known) != ONE:
                return o
            return nudge(o.expand(EXAMPLES, *o.shape[1:]), example)

        return tree_map(repeat, output)

    # Conclusions

    def _settle_arguments(self) -> None:
        """An argument (n, n), or one that does not bear to be sliced: has it a row an example, or do all share it?"""
        rows = range(2 if self.arguments.count == EXAMPLES else EXAMPLES)  # unlike the batch's, or all would fit
        doubtful = self.arguments.squares
        if not doubtful:
            try:
                self.run(rows)
                return
            except CoverageError:
                doubtful = self.arguments.later
                if not doubtful:
                    raise
        for i in doubtful:
            results: dict[tuple[int, ...], list[Tensor]] = {}
            for self.shared in ((), (i,)):
                with suppress(CoverageError):
                    results[self.shared] = self.run(rows)[1]
            if len(results) == 2 and not fallback.same(*results.values()):
                raise CoverageError(
                    f"{type(self.module).__name__}: an argument of shape {tuple(self.arguments.values[i].shape)} could "
                    f"be one row an example or a square shared by all. Use another batch size, or say which: "
                    f"attach(model, example_dims={{...}})"
                )
            self.shared = next(iter(results), ())
            if self.shared:
                return

    def _layouts(self) -> list[tuple[Visit, tuple[Layout | None, ...]]]:
        rows = list(range(EXAMPLES))
        fewer, _ = self.run(rows[:-1])
        visits, outputs = self.run(rows)
        others, reached = [], []
        for example in rows:
            other, changed = self.run(rows, replaced=example)
            others.append(other)
            reached.append([entries(a, b) for a, b in zip(outputs, changed, strict=True)])
        found = []
        for i, visit in enumerate(visits):
            small, *replaced = same = [run[i] for run in (fewer, *others) if len(run) == len(visits)] or [visit]
            if len(same) < 1 + EXAMPLES or any((v.leaf, v.key) != (visit.leaf, visit.key) for v in same):
                self._move(visit.leaf, visit.callers, "is called as often as the data decide")
                continue
            try:
                found.append((visit, self._layouts_of(visit, small, replaced)))
            except Unclear as reason:
                self._move(visit.leaf, visit.callers, str(reason))
        if not self.moves:
            self._check_vmapped(found)
            self._check_shared(found, reached[0])
        return found

    def _layouts_of(self, visit: Visit, small: Visit, replaced: Sequence[Visit]) -> tuple[Layout | None, ...]:
        layouts: list[Layout | None] = []
        for part in ("inputs", "outputs"):
            for i, x in enumerate(getattr(visit, part)):
                try:
                    others = [getattr(other, part)[i] for other in replaced]
                    layouts.append(layout_of(getattr(small, part)[i], x, others))
                except Mixes:
                    raise self._mixes(visit, part, x) from None
        told = [layout for layout in layouts[: len(visit.inputs)] if layout is not None]
        rule = visit.leaf.rule
        if rule is None:
            if not any(layout not in (None, ONE) for layout in told):
                raise Unclear("is called with nothing that runs over the examples")
            for o, layout in zip(visit.outputs, layouts[len(visit.inputs) :], strict=True):
                if layout is None and o.requires_grad:
                    raise Unclear("returns a tensor that depends on parameters but does not run over the examples")
        elif not told or (layouts[0] is None and isinstance(visit.inputs[0], Tensor)):
            raise Unclear("is called with an input that does not run over the examples")
        elif issubclass(rule, Composite):
            dim = 0 if visit.key == PACKED else rule.example_dim(visit.leaf.module, (visit.inputs[0],), {})
            if layouts[0] not in (Layout(dim), ONE):
                raise Unclear(f"expects the examples in dimension {dim} of its input, and gets them elsewhere")
        elif any(layout.dim for layout in told) and not rule.leading_alike:
            raise Unclear("is called with the examples elsewhere than in the first dimension")
        return tuple(layouts)

    def _mixes(self, visit: Visit, part: str, x: Tensor) -> CoverageError:
        leaf = visit.leaf
        if part == "outputs" and not x.dim():
            return CoverageError(
                f"{leaf.title} returns a tensor of shape () that has no dimension of examples. Return losses and other "
                f"reductions outside of the attached module"
            )
        what = f"what reaches {leaf.title}" if part == "inputs" else f"the output of {leaf.title}"
        names = ", ".join(f"'{account.name}'" for account in leaf.accounts.values())
        return CoverageError(
            f"{what} for one example depends on the other examples of the batch: per-example gradients of {names} do "
            f"not exist. Keep what mixes examples (normalisation over the batch, a mean over rows) outside of the "
            f"forward: in the loss, or replaced by something that sees one example"
        )

    def _move(self, leaf: Leaf, callers: Sequence[nn.Module], why: str) -> None:
        """The module that calls the leaf becomes a vmap leaf."""
        above = [module for module in callers if module in self.inside and module is not leaf.module]
        names = ", ".join(f"'{account.name}'" for account in leaf.accounts.values())
        if not above:
            raise CoverageError(
                f"{leaf.title}, which owns {names}, {why}, and there is no module around it that could run under vmap "
                f"instead. Attach a module whose forward takes the whole batch, or ignore=[...] these parameters"
            )
        self._adopt(above[-1], f"'{leaf.prefix}' {why}")

    def _adopt(self, module: nn.Module, why: str) -> None:
        self.moves.setdefault(module, why)

    def _functional_use(self, function: str, account: Any) -> None:
        """A parameter is used outside of its leaf: the innermost caller that contains its module takes over."""
        if self.serving is not None and account in self.serving.accounts.values():
            return
        holders = {m for m in self.inside if any(p is account.parameter for p in m._parameters.values())}
        for module in reversed(self.callers):
            if module in self.inside and holders <= set(module.modules()):
                self._adopt(module, f"parameter '{account.name}' is used by {function} outside of its layer")
                return

    # Checks

    def _check_vmapped(self, found: Sequence[tuple[Visit, tuple[Layout | None, ...]]]) -> None:
        self.handle.probing = self
        try:
            for visit, layouts in found:
                if visit.call is not None:
                    self._compare(visit.leaf, visit.call, layouts)
        except CoverageError as error:
            self.handle.probing = None
            leaf = visit.leaf
            raise CoverageError(f"{leaf.title}, {leaf.why}: {error}") from error
        finally:
            self.handle.probing = None

    def _compare(self, leaf: Leaf, call: fallback.OverExamples, layouts: Sequence[Layout | None]) -> None:
        try:
            fallback.compare(call, layouts, EXAMPLES, leaf.loops)
        except fallback.DoesNotVmap as error:
            leaf.loops = True
            leaf.why = f"{leaf.why}; {error}"
            fallback.compare(call, layouts, EXAMPLES, leaf.loops)

    def _check_shared(self, found: Sequence[Any], reached: Sequence[Tensor | None]) -> None:
        """What is repeated for every example must reach that example only: nothing that the first example does not."""
        if not any(ONE in layouts for _, layouts in found):
            return
        for visit, layouts in found:
            visit.leaf.layouts[visit.key] = layouts
        runs = []
        for nudged in (-1, 0):  # -1: repeated, and not changed
            self.nudged = nudged
            try:
                runs.append(self.run(range(EXAMPLES)))
            finally:
                self.nudged = None
        (still, before), (changed, after) = runs
        for (visit, layouts), one, other in zip(found, still, changed, strict=True):
            for layout, x, y in zip(layouts, one.inputs, other.inputs, strict=False):
                # Not what the call itself repeats.
                if isinstance(x, Tensor) and layout is not None and x.shape[layout.dim] % EXAMPLES == 0:
                    try:
                        order_of(x, layout.dim, [changed_entries(x, y, layout.dim)])
                    except Mixes:
                        raise self._mixes(visit, "inputs", x) from None
        for a, b, own in zip(before, after, reached, strict=True):
            changes = entries(a, b)
            if own is not None and changes is not None and bool((changes & ~own).any()):
                titles = ", ".join(visit.leaf.title for visit, layouts in found if ONE in layouts)
                raise CoverageError(
                    f"{titles}: called once for all examples, and the result reaches them in a way that does not run "
                    f"along its first dimension. Call it with one row an example, or attach(model, engine='vmap')"
                )


def entries(a: Tensor, b: Tensor) -> Tensor | None:
    """Which examples' entries of an output changed; None for what is no batch."""
    batch = a.shape == b.shape and a.dim() > 0 and a.shape[0] == EXAMPLES
    return changed_entries(a, b, 0) if batch else None


def kept(value: Any) -> Any:
    """A tensor without its graph."""
    return value.detach().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


def unpacked(sequences: PackedSequence) -> Tensor:
    """One row an example (n, i), in the order from before they were packed."""
    return pad_packed_sequence(sequences, batch_first=True)[0].sum(1)
