"""What the visits of the leaves in probing forwards say, put together: where the examples are in every kind of call."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from gradstats.errors import CoverageError
from gradstats.evidence import Mixes, Unclear, layouts_of, met
from gradstats.layout import NEW, ONE, Layout
from gradstats.rules import Composite, Rule, fallback

if TYPE_CHECKING:
    from gradstats.leaf import Leaf

PACKED = "packed"  # the kind of call of a recurrent layer that has no dimension of examples

Places = frozenset[Layout | None]


class Visit(NamedTuple):
    """One call of a leaf in a probing forward."""

    leaf: Leaf
    key: Any  # the kind of call
    inputs: list[Any]
    outputs: list[Tensor]  # that a vmap leaf returned
    callers: tuple[nn.Module, ...]  # modules under way, outermost first
    call: fallback.OverExamples | None


class Findings:
    """Layouts of all kinds of calls; `unclear(visit, reason)` is told of those that have none."""

    def __init__(self, unclear: Callable[[Visit, str], None]):
        self.unclear = unclear
        self.places: dict[tuple[Leaf, Any], list[Places]] = {}
        self.visits: dict[tuple[Leaf, Any], Visit] = {}  # the first of each kind
        self.uses: Counter[Leaf] = Counter()  # the most in one forward

    def add(self, small: Sequence[Visit], whole: Sequence[Visit], other: Sequence[Visit], example: int) -> None:
        """The visits of three forwards: of an example less, of all, and of all with one of them replaced.

        Visits of a leaf are compared in their order, since other leaves may be visited at random.
        """
        by_leaf = [grouped(visits) for visits in (small, whole, other)]
        for leaf, visits in by_leaf[1].items():
            self.uses[leaf] = max(self.uses[leaf], len(visits))
            alike = [group.get(leaf, []) for group in by_leaf]
            for visit in visits:
                self.visits.setdefault((leaf, visit.key), visit)
            if any([v.key for v in group] != [v.key for v in visits] for group in alike):
                continue
            for a, visit, b in zip(*alike, strict=True):
                try:
                    self._meet(visit, self._places(visit, a, b, example))
                except Unclear as reason:
                    self.unclear(visit, str(reason))

    def known(self, visit: Visit) -> None:
        """Layouts of earlier probes stay, or become more general."""
        layouts = visit.leaf.layouts.get(visit.key)
        if layouts is not None:
            self._meet(visit, [frozenset([None if layout == NEW else layout]) for layout in layouts])

    def _meet(self, visit: Visit, places: list[Places]) -> None:
        kind = visit.leaf, visit.key
        known = self.places.get(kind)
        self.places[kind] = places if known is None else [met(a, b) for a, b in zip(known, places, strict=True)]

    def layouts(self) -> dict[tuple[Leaf, Any], tuple[Layout | None, ...]]:
        """The layouts, and what cannot be served told to `unclear`."""
        found = {}
        for kind, visit in self.visits.items():
            try:
                if kind not in self.places:
                    raise Unclear("is called as often as the data decide")
                self.known(visit)
                found[kind] = self._settled(visit, self.places[kind])
            except Unclear as reason:
                self.unclear(visit, str(reason))
        return found

    @staticmethod
    def repeatable(visit: Visit) -> bool:
        """Whether a call with an input that all examples share, like positions (t,), can be made with one an example:
        where leading dimensions are alike. What becomes of the result is checked."""
        rule, x = visit.leaf.rule, visit.inputs[0]
        return isinstance(x, Tensor) and rule is not None and issubclass(rule, Rule) and rule.leading_alike

    def _places(self, visit: Visit, small: Visit, other: Visit, example: int) -> list[Places]:
        places = []
        for part in ("inputs", "outputs"):
            for a, x, b in zip(getattr(small, part), getattr(visit, part), getattr(other, part), strict=True):
                try:
                    places.append(layouts_of(a, x, b, example))
                except Mixes:
                    raise mixes(visit, part, x) from None
        return places

    def _settled(self, visit: Visit, places: list[Places]) -> tuple[Layout | None, ...]:
        if any(len(place) > 1 for place in places):
            raise Unclear("is called with examples and positions in one dimension, in an order that does not show")
        layouts = tuple(next(iter(place)) for place in places)
        told = [layout for layout in layouts[: len(visit.inputs)] if layout is not None]
        rule = visit.leaf.rule
        if rule is None:
            if all(layout == ONE for layout in told):
                raise Unclear("is called with nothing that runs over the examples")
            for o, layout in zip(visit.outputs, layouts[len(visit.inputs) :], strict=True):
                if layout is None and o.requires_grad:
                    raise Unclear("returns a tensor that depends on parameters but does not run over the examples")
        elif len(layouts) == 1 and layouts[0] is None and self.repeatable(visit):
            return (NEW,)
        elif not told or (layouts[0] is None and isinstance(visit.inputs[0], Tensor)):
            raise Unclear("is called with an input that does not run over the examples")
        elif issubclass(rule, Composite):
            dim = 0 if visit.key == PACKED else rule.example_dim(visit.leaf.module, (visit.inputs[0],), {})
            if layouts[0] not in (Layout(dim), Layout(dim, folded=True), ONE):
                raise Unclear(f"expects the examples in dimension {dim} of its input, and gets them elsewhere")
        elif any(layout.dim for layout in told) and not rule.leading_alike:
            raise Unclear("is called with the examples elsewhere than in the first dimension")
        return layouts


def grouped(visits: Sequence[Visit]) -> dict[Leaf, list[Visit]]:
    found = defaultdict(list)
    for visit in visits:
        found[visit.leaf].append(visit)
    return found


def mixes(visit: Visit, part: str, x: Tensor) -> CoverageError:
    """The refusal of a forward in which one example's entries of x change with the other examples."""
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
