"""The probe: a few forwards of a few examples, before the first step, in which every use of every parameter is seen.

Two sizes of the batch tell which dimension of a leaf's input runs over the examples; replacing one example at a time
tells which of its entries are that example's, and whether anything mixes examples on the way. A parameter that is used
outside of its leaf, or where no dimension runs over examples, moves the leaf's boundary up to the module that called.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence
from torch.utils._pytree import tree_leaves, tree_map, tree_unflatten

from gradstats.arguments import Arguments
from gradstats.errors import CoverageError, GradstatsError
from gradstats.evidence import EXAMPLES, Mixes, changed_entries, misplaced, nudge
from gradstats.findings import PACKED, Findings, Visit, mixes
from gradstats.layout import ONE, Layout
from gradstats.rules import Composite, fallback
from gradstats.watch import FunctionalUses, reached, undisturbed

if TYPE_CHECKING:
    from gradstats.engines.fused import FusedHandle
    from gradstats.leaf import Leaf


class CouldNotRun(CoverageError):
    """The model raised something of its own in a probing forward."""


Layouts = tuple[Layout | None, ...]
NOT_NUDGED = -1  # repeated for every example, and the same for all


class Probe:
    """What a signature of calls of one module does with its parameters."""

    def __init__(self, handle: FusedHandle, module: nn.Module, arguments: Arguments, round: int = 0):
        self.handle, self.module, self.arguments = handle, module, arguments
        self.round = self.seed = round  # other rows and random numbers in every round
        self.forwards, self.seconds = 0, 0.0
        self.visits: list[Visit] = []
        self.callers: list[nn.Module] = []  # under way, outermost first
        self.called: set[nn.Module] = set()
        self.serving: Leaf | None = None  # whose forward is under way
        self.moves: dict[nn.Module, str] = {}  # modules that are to become vmap leaves, and why
        self.shared: tuple[int, ...] = ()  # arguments that all examples share after all
        self.inside = set(handle.model.modules())
        self.tracked = {id(a.parameter): a for a in handle.accounts.values() if a.trainable}
        self.digested = 0  # examples of a forward of which only a number a row is kept
        self.nudged: int | None = None  # the example whose copy of what all share is changed

    def establish(self) -> None:
        """Finds the layouts of all leaves; in later rounds, confirms them. Raises: CoverageError if the forward mixes
        examples, or hides them; what the model itself raises."""
        begun = time.perf_counter()
        known = self.round > 0
        while True:
            if not known:
                try:
                    self._settle_arguments()
                    self._look_closely()
                except CouldNotRun:
                    self._run_plainly()
                    raise
            if not self.moves:
                self._check_whole_batch()
            if not self.moves:
                break
            self._move_up()
            known = False
        self.seconds = time.perf_counter() - begun

    def _move_up(self) -> None:
        for module, why in self.moves.items():
            if not any(module in set(other.modules()) for other in self.moves if other is not module):
                self.handle.move_up(module, why)
        self.moves = {}

    def _look_closely(self) -> None:
        findings, reached = self._look()
        layouts = findings.layouts()
        if self.moves:
            return
        for (leaf, key), found in layouts.items():
            leaf.layouts[key] = found
        self._check_vmapped(findings)
        self._check_shared(findings, layouts, reached)
        for account in self.handle.accounts.values():
            uses = sum(count for leaf, count in findings.uses.items() if account in leaf.accounts.values())
            account.uses = max(account.uses or 0, uses)

    def _run_plainly(self) -> None:
        """A model that fails with its whole batch too fails with its own error."""
        args, kwargs = tree_unflatten(self.arguments.values, self.arguments.spec)
        with undisturbed(self.handle.model, self.seed):
            self.handle.probing = self
            try:
                self.module.forward(*args, **kwargs)
            finally:
                self.handle.probing = None

    def _look(self) -> tuple[Findings, list[Tensor | None]]:
        """All findings, and which examples' entries of the module's outputs the first example reaches.

        Every example is replaced once, each under other random numbers: what is done at random is seen too.
        """
        rows = list(range(EXAMPLES))
        findings, reached = Findings(self._unclear), []
        for example in range(EXAMPLES):
            self.seed = example
            small, _ = self.run(rows[:-1])
            whole, outputs = self.run(rows)
            other, changed = self._run_replaced(rows, example)
            findings.add(small, whole, other, example)
            if example == 0:
                reached = [entries(a, b) for a, b in zip(outputs, changed, strict=True)]
        return findings, reached

    def _run_replaced(self, rows: Sequence[int], example: int) -> tuple[list[Visit], list[Tensor]]:
        """One example replaced: the second by a version of itself in which masks are shorter and lengths smaller, since
        first batches are often full. A model may not bear that, nor other lengths, nor (all ids zero) any other."""
        for how in ("altered", "another", "same length"):
            if how != "altered" or example == 1:
                with suppress(CoverageError):
                    return self.run(rows, (example, how))
        return self.run(rows)

    # Forwards

    def run(self, rows: Sequence[int], replaced: tuple[int, str] | None = None) -> tuple[list[Visit], list[Tensor]]:
        """One forward: its visits, and the tensors that the module returns."""
        self.visits, self.callers, self.called = [], [], {self.module}
        self.forwards += 1
        args, kwargs = self.arguments.take(rows, replaced, self.shared)
        with undisturbed(self.handle.model, self.seed), self._watching():
            output = self.module.forward(*args, **kwargs)
        outputs = [o for o in tree_leaves(output) if isinstance(o, Tensor)]
        self._hidden_uses(outputs)
        return self.visits, [o.detach() for o in outputs]

    @contextmanager
    def _watching(self) -> Iterator[None]:
        self.handle.probing = self
        try:
            with torch.enable_grad(), FunctionalUses(self.tracked, self._functional_use):
                yield
        except GradstatsError:
            raise
        except Exception as error:
            raise CouldNotRun(
                f"the probe could not run {type(self.module).__name__} on a few examples of the batch "
                f"({type(error).__name__}: {error}). If its arguments have the examples elsewhere than in the first "
                f"dimension, say where: attach(model, example_dims=...). A state of the batch's size that is kept "
                f"between calls must be an argument of the call."
            ) from error
        finally:
            self.handle.probing = None

    @contextmanager
    def calling(self, module: nn.Module) -> Iterator[None]:
        """Around the forward of a module that is no leaf."""
        self.callers.append(module)
        self.called.add(module)
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
        if self.digested:
            places = leaf.layouts.get(key, ())
            inputs = [digest(x, layout, self.digested) for x, layout in zip(inputs, places, strict=False)]
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

    def _unclear(self, visit: Visit, why: str) -> None:
        self._move(visit.leaf, visit.callers, why)

    def _move(self, leaf: Leaf, callers: Sequence[nn.Module], why: str) -> None:
        """The module that calls the leaf becomes a vmap leaf."""
        above = [module for module in callers if module in self.inside and module is not leaf.module]
        names = ", ".join(f"'{account.name}'" for account in leaf.accounts.values())
        if not above:
            raise CoverageError(
                f"{leaf.title}, which owns {names}, {why}: what it does for one example depends on the other examples, or "
                f"cannot be told from that, and there is no module around it that could run under vmap instead. Attach a module whose forward takes the whole batch, or ignore=[...] these parameters"
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

    def _hidden_uses(self, outputs: Sequence[Tensor]) -> None:
        """Parameters that the outputs depend on although no leaf of theirs was called: a custom autograd.Function took
        them, which no TorchFunctionMode sees."""
        served = {account for visit in self.visits for account in visit.leaf.accounts.values()}
        for parameter in reached(outputs) & self.tracked.keys():
            if self.tracked[parameter] not in served:
                self.callers = sorted(self.called, key=lambda module: -len(list(module.modules())))
                self._functional_use("an autograd.Function", self.tracked[parameter])

    # Checks

    def _check_vmapped(self, findings: Findings) -> None:
        for visit in findings.visits.values():
            if visit.call is not None:
                self._compare(visit.leaf, visit.call, EXAMPLES)

    def _check_whole_batch(self) -> None:
        """The same with all examples: some couplings need more than a few of them."""
        count = self.arguments.count or 0
        if count == 1 or (count <= EXAMPLES and not self.round):
            return
        replaced = self.round % count
        self.digested = count
        try:
            still, _ = self.run(range(count))
            changed, _ = self.run(range(count), (replaced, "another"))
        except CouldNotRun:  # another example may be too much for it
            return
        finally:
            self.digested = 0
        for visit, other in zip(still, changed, strict=False):
            if visit.call is not None and visit.key in visit.leaf.layouts:
                self._compare(visit.leaf, visit.call, count, gradient=False)
            for x, y in zip(visit.inputs, other.inputs, strict=False):
                if isinstance(x, Tensor) and isinstance(y, Tensor) and x.shape == y.shape and visit.leaf is other.leaf:
                    # Groups of other sizes (of an expert's tokens) are summed up in another order.
                    slack = torch.finfo(x.dtype).eps ** 0.5 * x.abs().nan_to_num(posinf=0).max()
                    rows, fold = ((x - y).abs() > slack).nonzero().flatten(), len(x) // count
                    if bool((rows // fold != replaced).any()):
                        reason = misplaced(rows, fold)
                        if isinstance(reason, Mixes):
                            raise mixes(visit, "inputs", x)
                        self._move(visit.leaf, visit.callers, str(reason))

    def _compare(self, leaf: Leaf, call: fallback.OverExamples, n: int, gradient: bool = True) -> None:
        """A vmap leaf does what its module does, under vmap or, where that fails, in a loop."""
        self.handle.probing = self
        layouts = leaf.layouts[call.key]
        try:
            try:
                leaf.random = fallback.compare(call, layouts, n, leaf.loops, gradient)
            except fallback.DoesNotVmap as error:
                leaf.loops, leaf.why = True, f"{leaf.why}; {error}"
                leaf.random = fallback.compare(call, layouts, n, leaf.loops, gradient)
        except CoverageError as error:
            raise CoverageError(f"{leaf.title}, {leaf.why}: {error}") from error
        finally:
            self.handle.probing = None

    def _check_shared(
        self, findings: Findings, layouts: Mapping[Any, Layouts], reached: Sequence[Tensor | None]
    ) -> None:
        """What is repeated for every example must reach that example only: nothing that the first example does not."""
        repeated = [leaf for (leaf, _), found in layouts.items() if ONE in found]
        if not repeated:
            return
        titles = ", ".join(leaf.title for leaf in dict.fromkeys(repeated))
        refusal = CoverageError(
            f"{titles}: called once for all examples, and the result reaches them in a way that does not run along its "
            f"first dimension. Call it with one row an example, or attach(model, engine='vmap')"
        )
        runs = []
        for self.nudged in (NOT_NUDGED, 0):
            try:
                runs.append(self.run(range(EXAMPLES)))
            except CoverageError as error:
                raise refusal from error
            finally:
                self.nudged = None
        (still, before), (changed, after) = runs
        for visit, other in zip(still, changed, strict=True):
            for layout, x, y in zip(layouts.get((visit.leaf, visit.key), ()), visit.inputs, other.inputs, strict=False):
                # Not what the call itself repeats.
                if isinstance(x, Tensor) and layout is not None and x.shape[layout.dim] % EXAMPLES == 0:
                    entry = torch.arange(x.shape[layout.dim])[changed_entries(x, y, layout.dim).cpu()]
                    owner = entry % EXAMPLES if layout.fastest else entry // (x.shape[layout.dim] // EXAMPLES)
                    if bool(owner.any()):
                        raise refusal
        for a, b, own in zip(before, after, reached, strict=True):
            changes = entries(a, b)
            if own is not None and changes is not None and bool((changes & ~own).any()):
                raise refusal


def entries(a: Tensor, b: Tensor) -> Tensor | None:
    """Which examples' entries of an output changed; None for what is no batch."""
    batch = a.shape == b.shape and a.dim() > 0 and a.shape[0] == EXAMPLES
    return changed_entries(a, b, 0) if batch else None


def digest(x: Any, layout: Layout | None, n: int) -> Tensor | None:
    """A number a row of x, which tells whether the row has changed."""
    if not isinstance(x, Tensor) or layout is None or not layout.fits(x, n):
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
