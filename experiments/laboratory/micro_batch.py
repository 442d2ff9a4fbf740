"""Squares of micro-batches' gradients, in as many passes, against those of examples in one, at equal wall-clock."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.contest.analysis import Contest
from experiments.contest.plan import ContestStudy
from experiments.estimate import Finding
from experiments.laboratory.schemas import ContestConfig
from experiments.laboratory.verdicts import equals

MICROBATCH, SAME, EXAMPLE = "micro-batches of 4", "examples, R = 4", "examples, R = 1"
CLOSE = 0.05  # of a loss


class MicroBatch(ContestStudy[ContestConfig]):
    title = "Micro-batches or examples"
    question = "Do squares of examples' gradients reach a lower loss in the same time than squares of micro-batches'?"
    source = "Wang & Aitchison 2024: Adam is invariant to the batch size if it squares micro-batch gradients"

    def required(self) -> Sequence[str]:
        return (MICROBATCH, SAME, EXAMPLE)

    def findings(self, found: Contest) -> list[Finding]:
        return [claim(found, B) for claim in (_same, _faster, _lower) for B in found.settings.batch_sizes]


def _same(found: Contest, B: int) -> Finding:
    ratio = found.ratio(SAME, MICROBATCH, B)
    return Finding(
        f"B = {B}: at equal examples, examples at R = 4 train as micro-batches of 4 do, within {CLOSE:.0%}",
        equals(ratio, CLOSE),
        f"{found.compared(SAME, MICROBATCH, B)}: both estimate mu^2 + sigma^2/4.",
    )


def _faster(found: Contest, B: int) -> Finding:
    ratio = found.time_ratio(SAME, MICROBATCH, B)
    return Finding(
        f"B = {B}: squares of examples take less time than squares of micro-batches",
        ratio.verdict(1),
        f"A run takes {found.seconds(SAME, B):.2f} s against {found.seconds(MICROBATCH, B):.2f} s on this machine, a "
        f"ratio of {ratio}; R = 1 takes {found.seconds(EXAMPLE, B):.2f} s.",
    )


def _lower(found: Contest, B: int) -> Finding:
    ratio = found.at_equal_seconds(SAME, MICROBATCH, B)
    return Finding(
        f"B = {B}: at equal wall-clock, squares of examples reach a lower loss",
        ratio.verdict(1),
        "When the faster run ends, each at the learning rate that is best by then, the training loss of R = 4 is "
        f"{ratio} times that of micro-batches of 4, and that of R = 1 "
        f"{found.at_equal_seconds(EXAMPLE, MICROBATCH, B)} times.",
    )


STUDY = MicroBatch
