"""Engine "microbatch": squares of the gradients of whole backward passes, for any model.

Every backward pass between two zero_grad() is one micro-batch of b examples, and what it adds to p.grad is its
contribution c_i; M of them make B = M b examples. With h_i the mean gradient of a micro-batch,

    h_i = (scale/b) c_i        scale = B for a mean loss, 1 for a sum loss
    Q_b = (1/M) sum_i h_i^2    E Q_b = mu^2 + sigma^2/b

Neither layers nor examples are looked into, so that what mixes examples (BatchNorm in training) is served too: sigma^2
is then the variance that independent examples would have, if the mean of b of them scattered as micro-batches do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gradstats.arguments import ExampleDims
from gradstats.distributed.counts import Counts
from gradstats.engines.outside import ESTIMATED, OutsideHandle
from gradstats.engines.passes import Forwards, Pass
from gradstats.errors import GradstatsError, LifetimeError
from gradstats.statistics import Wanted
from gradstats.sums import GRADIENT, SQUARED_NORMS, SUM_OF_SQUARES, accumulation_dtype, wide
from gradstats.window import Statistic


class MicrobatchHandle(OutsideHandle):
    """Every backward pass is one micro-batch.

    With granularity "example", the sum of c_b^2 over examples is estimated, without bias, from the micro-batches':

        sum_b c_b^2 ~ C^2/B + k (sum_i c_i^2 / b - C^2/B)        C = sum_i c_i = p.grad        k = (B - 1)/(M - 1)

    so that the variance is s2 = (Q_b - m^2)/(1/b - 1/B), and the second moment q = m^2 + s2 (B - 1)/B. With b = 1 both
    are exact. With granularity "microbatch" every statistic is that of the M mean gradients.
    """

    engine = "microbatch"
    call = "loss.backward() on what the attached model returns"
    unseen = (
        "it was changed between two backward passes, or is older than attach. Call zero_grad() before the first "
        "backward pass"
    )

    def __init__(
        self,
        model: nn.Module,
        statistics: Sequence[Wanted],
        loss_reduction: str,
        ignore: Sequence[str] = (),
        example_dims: ExampleDims = 0,
        granularity: str = "example",
        microbatch_size: int | None = None,
    ):
        super().__init__(model, statistics, loss_reduction, ignore, granularity, microbatch_size)
        self._declared_size = microbatch_size
        self._forwards = Forwards(self._passes, example_dims)

    def check(self, statistic: Statistic) -> None:
        if self.granularity == "example" and not isinstance(statistic, ESTIMATED):
            raise GradstatsError(
                f"{statistic.name!r} of single examples cannot be estimated without bias from gradients of "
                f"micro-batches: {', '.join(repr(s.name) for s in ESTIMATED)} can. Use engine='fused', or "
                f"granularity='microbatch' for that of the micro-batches"
            )
        if any(raw.per == "pair" for raw in statistic.needs):
            raise GradstatsError(
                f"{statistic.name!r} needs the gradients of all micro-batches at once, and engine 'microbatch' keeps "
                f"none: use engine='fused', or 'projection', whose inner products estimate it"
            )

    # Backward

    def examples(self, ended: Pass) -> int:
        examples = self._forwards.examples(ended.forwards)
        if self.granularity == "example":
            self.microbatch_size = examples
        return examples

    def found(self, gradients: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        found = self.of_each(gradients)
        # C^2 is read where b > 1. With other ranks sums are asked for before the pass has ended, when b is not known.
        if self.granularity == "example" and (self.microbatch_size != 1 or self.exchange is not None):
            for name, c in gradients.items():
                # A copy, to which the next passes add: parameters may share the tensor, as a and b in a + b do.
                found[name][GRADIENT.key] = c.to(accumulation_dtype(c.dtype), copy=True)
        return found

    def add(self, ended: Pass) -> None:
        """In place where squares alone are wanted and all parameters have some: of large gradients most of the time is
        that of fresh memory."""
        own = [self._sums[name].totals for name in ended.arrived]
        squares = [totals[SUM_OF_SQUARES.name] for totals in own if SUM_OF_SQUARES.name in totals]
        if self.exchange is not None or not self.squares_alone or len(squares) < len(own):
            return super().add(ended)
        c = [wide(gradient.to_dense()) for gradient in ended.arrived.values()]
        torch._foreach_addcmul_(squares, c, c)
        for totals, gradient in zip(own, c, strict=True):
            if GRADIENT.key in totals:
                totals[GRADIENT.key].add_(gradient)

    def receive(self, ranks: int, counts: Counts, found: dict[tuple[str, str], Tensor]) -> None:
        super().receive(ranks, counts, found)
        for name in counts.counted:
            gradient = self.parameters()[name].grad
            if gradient is not None and self.granularity == "example":
                of_all = self._sums[name].of_all
                assert of_all is not None
                of_all.sums[GRADIENT.key] = wide(gradient.to_dense()) * ranks

    def new_examples(self) -> None:
        self._forwards.new_examples()

    # Reading

    def sums(self, name: str, needs: Sequence[str]) -> tuple[dict[str, Tensor], int]:
        found, sizes = self.over_passes(name, needs)
        b, m = self._size(sizes), len(sizes)
        if self.granularity == "microbatch" or b == 1:
            return found, m
        own = self._sums[name]
        whole = (own.totals if own.of_all is None else own.of_all.sums)[GRADIENT.key].square()
        return {need: of_examples(need, found[need], whole, b, m) for need in needs}, b * m

    def _size(self, sizes: list[float]) -> int:
        """b. Raises: LifetimeError if micro-batches differ in it."""
        found = sorted(set(sizes))
        if len(found) > 1:
            raise LifetimeError(
                f"the backward passes since zero_grad() were over {', '.join(f'{n:g}' for n in sizes)} examples: "
                f"squares of gradients of unequal micro-batches do not add up. Make them equal (drop_last=True), or "
                f"use engine='fused'"
            )
        if self._declared_size not in (None, found[0]):
            raise LifetimeError(
                f"every backward pass is one micro-batch, and these were over {found[0]:g} examples, not over "
                f"microbatch_size={self._declared_size}: backpropagate as many at a time, or use engine='fused'"
            )
        return int(found[0])

    def zero(self) -> None:
        super().zero()
        self._forwards.forget()

    def detach(self) -> None:
        super().detach()
        self._forwards.close()


def of_examples(need: str, found: Tensor, whole: Tensor, b: int, m: int) -> Tensor:
    """The sum over B = M b examples, b > 1, that micro-batches estimate (see MicrobatchHandle), from theirs and C^2.

    Of squared norms, only the sum over examples is known.
    """
    if m < 2:
        raise GradstatsError(
            f"{need!r} of single examples cannot be told from one micro-batch of {b}: backpropagate two at least "
            f"between zero_grad() and reading (each loss divided by their number), or, unless it has BatchNorm or the "
            f"like, use engine='fused'"
        )
    if need == SQUARED_NORMS.name:
        found, whole = found.sum(), whole.sum()
    mean = whole / (b * m)
    return mean + (found / b - mean).clamp(min=0) * ((b * m - 1) / (m - 1))
