"""The probe: a few forwards of a few examples, before the first step, in which every use of every parameter is seen.

Two sizes of the batch tell which dimension of a leaf's input runs over the examples; replacing one example at a time
tells which of its entries are that example's, and whether anything mixes examples on the way. A parameter that is used
outside of its leaf, or where no dimension runs over examples, moves the leaf's boundary up to the module that called.

What it cannot see: coupling that only some random draws take, until a round of the probe falls on such a draw (rounds
are at the calls 1, 2, 4, 8, ...); and coupling below rounding, which in bfloat16 is a tenth of a feature's largest
entry. The user's own hooks run in its forwards too.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gradstats.arguments import Arguments
from gradstats.errors import CoverageError
from gradstats.evidence import EXAMPLES, Mixes, changed_entries, misplaced
from gradstats.findings import Findings, Visit, mixes
from gradstats.forwards import NOT_NUDGED, CouldNotRun, Forwards, FunctionalUse
from gradstats.layout import NEW, ONE, Layout
from gradstats.rules import alone, fallback

if TYPE_CHECKING:
    from gradstats.engines.fused import FusedHandle
    from gradstats.leaf import Leaf


Layouts = tuple[Layout | None, ...]


class Probe:
    """What a signature of calls of one module does with its parameters."""

    def __init__(
        self, handle: FusedHandle, module: nn.Module, arguments: Arguments, round: int = 0, within: bool = False
    ):
        self.handle, self.module, self.arguments = handle, module, arguments
        self.forwards = Forwards(handle, module, arguments, within)
        self.round = self.forwards.seed = round  # other rows and random numbers in every round
        self.seconds = 0.0
        self.moves: dict[nn.Module, str] = {}  # modules that are to become vmap leaves, and why
        self.inside = set(handle.model.modules())

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
                    self.forwards.run_plainly()
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

    def _look(self) -> tuple[Findings, list[Tensor | None]]:
        """All findings, and which examples' entries of the module's outputs the first example reaches.

        Every example is replaced once, each under other random numbers: what is done at random is seen too.
        """
        rows = list(range(EXAMPLES))
        findings, reached = Findings(self._unclear), []
        for example in range(EXAMPLES):
            self.forwards.seed = example
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
                with suppress(CouldNotRun):
                    return self.run(rows, (example, how))
        return self.run(rows)

    def run(self, rows: Sequence[int], replaced: tuple[int, str] | None = None) -> tuple[list[Visit], list[Tensor]]:
        """One forward, after which what it says about the boundaries of leaves is known."""
        try:
            return self.forwards.run(rows, replaced)
        finally:
            oddities, uses = self.forwards.oddities, self.forwards.uses
            self.forwards.oddities, self.forwards.uses = [], []
            for leaf, callers, why in oddities:
                self._move(leaf, callers, why)
            for use in uses:
                self._move_for(use)

    # Conclusions

    def _settle_arguments(self) -> None:
        """An argument (n, n), or one that does not bear to be sliced: has it a row an example, or do all share it?"""
        rows = range(2 if self.arguments.count == EXAMPLES else EXAMPLES)  # unlike the batch's, or all would fit
        doubtful = self.arguments.squares
        if not doubtful:
            try:
                self.run(rows)
                return
            except CouldNotRun:
                doubtful = self.arguments.later
                if not doubtful:
                    raise
        for i in doubtful:
            results: dict[tuple[int, ...], list[Tensor]] = {}
            for self.forwards.shared in ((), (i,)):
                with suppress(CoverageError):
                    results[self.forwards.shared] = self.run(rows)[1]
            if len(results) == 2 and not alone.same(*results.values()):
                raise CoverageError(
                    f"{type(self.module).__name__}: an argument of shape {tuple(self.arguments.values[i].shape)} could "
                    f"be one row an example or a square shared by all. Use another batch size, or say which: "
                    f"attach(model, example_dims={{...}})"
                )
            self.forwards.shared = next(iter(results), ())
            if self.forwards.shared:
                return

    def _unclear(self, visit: Visit, why: str) -> None:
        self._move(visit.leaf, visit.callers, why)

    def _move(self, leaf: Leaf, callers: Sequence[nn.Module], why: str) -> None:
        """The module that calls the leaf becomes a vmap leaf."""
        above = [module for module in callers if module in self.inside and module is not leaf.module]
        names = ", ".join(f"'{account.name}'" for account in leaf.accounts.values())
        if not above:
            raise CoverageError(
                f"{leaf.title}, which owns {names}, {why}: what it does for one example depends on the other examples, "
                f"or cannot be told from that, and there is no module around it that could run under vmap instead. "
                f"If the arguments have the examples elsewhere than in the first dimension, say where: "
                f"attach(model, example_dims=1). Else attach a module whose forward takes the whole batch, or "
                f"ignore=[...] these parameters"
            )
        self._adopt(above[-1], f"'{leaf.prefix}' {why}")

    def _adopt(self, module: nn.Module, why: str) -> None:
        self.moves.setdefault(module, why)

    def _move_for(self, use: FunctionalUse) -> None:
        """The innermost caller that contains the parameter's module takes over."""
        holders = {m for m in self.inside if any(p is use.account.tensor for p in m._parameters.values())}
        for module in reversed(use.callers):
            if module in self.inside and holders <= set(module.modules()):
                self._adopt(module, f"parameter '{use.account.name}' is used by {use.function} outside of its layer")
                return

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
        self.forwards.digested = count
        try:
            still, _ = self.run(range(count))
            changed, _ = self.run(range(count), (replaced, "another"))
        except CouldNotRun:  # another example may be too much for it
            return
        finally:
            self.forwards.digested = 0
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
        layouts = leaf.layouts[call.key]
        try:
            with self.forwards.gathered(leaf.module), self.handle.probed_by(self.forwards):
                try:
                    leaf.random = alone.compare(call, layouts, n, leaf.loops, gradient)
                except fallback.DoesNotVmap as error:
                    leaf.loops, leaf.why = True, f"{leaf.why}; {error}"
                    leaf.random = alone.compare(call, layouts, n, leaf.loops, gradient)
        except CoverageError as error:
            raise CoverageError(f"{leaf.title}, {leaf.why}: {error}") from error

    def _check_shared(
        self, findings: Findings, layouts: Mapping[Any, Layouts], reached: Sequence[Tensor | None]
    ) -> None:
        """What is repeated for every example must reach that example only: nothing that the first example does not."""
        repeated = [leaf for (leaf, _), found in layouts.items() if ONE in found or NEW in found]
        if not repeated:
            return
        reason = self._misses(layouts, reached)
        if reason is None:
            return
        in_front = [findings.visits[kind] for kind, found in layouts.items() if NEW in found]
        for visit in in_front:
            self._move(visit.leaf, visit.callers, "is called with an input that does not run over the examples")
        if not in_front:
            titles = ", ".join(leaf.title for leaf in dict.fromkeys(repeated))
            raise CoverageError(
                f"{titles}: called once for all examples, and the result reaches them in a way that does not run along "
                f"its first dimension. Call it with one row an example, or attach(model, engine='vmap')"
            ) from reason

    def _misses(self, layouts: Mapping[Any, Layouts], reached: Sequence[Tensor | None]) -> Exception | None:
        """Why what is repeated for every example does not do what it did, or reaches other examples too."""
        _, plain = self.run(range(EXAMPLES))
        runs = []
        for self.forwards.nudged in (NOT_NUDGED, 0):
            try:
                runs.append(self.run(range(EXAMPLES)))
            except CoverageError as error:
                return error
            finally:
                self.forwards.nudged = None
        (still, before), (changed, after) = runs
        if not alone.close(plain, before):
            return ValueError("the output changes when it is repeated")
        for visit, other in zip(still, changed, strict=True):
            known = layouts.get((visit.leaf, visit.key))
            if known is None:
                return ValueError(f"{visit.leaf.title} is called in another way when it is repeated")
            for layout, x, y in zip(known, visit.inputs, other.inputs, strict=False):
                # Not what the call itself repeats.
                if layout is None or layout.new or not isinstance(x, Tensor):
                    continue
                if x.shape[layout.dim] % EXAMPLES == 0:
                    entry = torch.arange(x.shape[layout.dim])[changed_entries(x, y, layout.dim).cpu()]
                    owner = entry % EXAMPLES if layout.fastest else entry // (x.shape[layout.dim] // EXAMPLES)
                    if bool(owner.any()):
                        return ValueError(f"other examples' rows change in {visit.leaf.title}")
        for a, b, own in zip(before, after, reached, strict=True):
            changes = entries(a, b)
            if own is not None and changes is not None and bool((changes & ~own).any()):
                return ValueError("other examples' rows change in the output")
        return None


def entries(a: Tensor, b: Tensor) -> Tensor | None:
    """Which examples' entries of an output changed; None for what is no batch."""
    batch = a.shape == b.shape and a.dim() > 0 and a.shape[0] == EXAMPLES
    return changed_entries(a, b, 0) if batch else None
