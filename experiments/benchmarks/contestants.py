"""Who takes part: every row of the table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from experiments.benchmarks.peers import BackPACK, Func, Ghost, Loop, Microbatches, Opacus
from experiments.benchmarks.stepper import ALL, Attached, Micro, Plain, Rounded, Signs, Stepper
from experiments.benchmarks.workloads import Problem
from gradstats.matmul import ROUNDING

EVERY = 8  # often enough for averages over hundreds of steps, seldom enough that little of the price is left
FRACTION = 1 / 8  # as many examples as every 8th step gathers
PARTS = 8  # micro-batches: as few as still tell a variance
ROWS = 16  # gradients of a model that fit where those of a batch do not
EXACT = 1e-6  # relative error in float64, far above rounding and far below what a forgotten term makes
SINGLE = 1e-3  # the same in float32
ROUNDED = 5e-2  # the same of bfloat16, which has three digits, through a dozen layers
VISIBLE = 1e-4  # what has rounded anything to bfloat16 is off by more, and what is exact in float32 by less
# One model of each kind, for those whose price is told by a few: what costs about as much as another one, or hours.
FEW = ("mlp", "resnet18", "gpt")

Make = Callable[[Problem], Stepper]


@dataclass(frozen=True)
class Contestant:
    """`tolerance`: the relative error up to which its statistic counts as correct, None for an estimate; `at_least`:
    below which it is not what its title says; `cycle`: steps that repeat, and so are timed as one; `baseline`: what its
    time is divided by; `only`: workloads, unless the contestant is named; `double`: whether it is checked in float64.
    """

    title: str
    statistic: str  # "" for none
    make: Make
    tolerance: float | None = EXACT
    at_least: float = 0.0
    cycle: int = 1
    baseline: Make = Plain
    only: tuple[str, ...] = ()
    double: bool = True

    @property
    def statistics(self) -> tuple[str, ...]:
        return {"": (), "all": ALL}.get(self.statistic, (self.statistic,))


def ours(title: str, statistic: str = "second_moment", **options: Any) -> Contestant:
    """Everywhere, as attach has it by default."""
    names = ALL if statistic == "all" else (statistic,)
    return Contestant(title, statistic, lambda problem: Attached(problem, *names, **options))


def peer(title: str, statistic: str, make: Callable[..., Stepper], *arguments: object) -> Contestant:
    return Contestant(title, statistic, lambda problem: make(problem, *arguments))


def backpack(title: str, statistic: str) -> Contestant:
    """Its embedding computes in float32."""
    return replace(peer(f"BackPACK, {title}", statistic, BackPACK, statistic), tolerance=SINGLE, double=False)


def estimate(title: str, make: Make) -> Contestant:
    return Contestant(title, "second_moment", make, tolerance=None)


def few(contestant: Contestant, **changes: Any) -> Contestant:
    return replace(contestant, only=FEW, **changes)


COMPILED_PLAIN = partial(Plain, compiled=True)
CONTESTANTS = {
    "plain": Contestant("plain torch, against itself", "", Plain),
    "ours-second_moment": ours("gradstats"),
    "ours-norms": ours("gradstats", "norms"),
    "ours-variance": few(ours("gradstats", "variance")),
    "ours-all": ours("gradstats", "all"),
    "ours-bf16": Contestant(
        "gradstats, statistics in bf16",
        "second_moment",
        Rounded,
        tolerance=ROUNDING[torch.bfloat16],
        at_least=VISIBLE,
        only=("mlp",),  # the layers that have such matmuls: Linear, without positions
        double=False,
    ),
    "ours-every": few(ours(f"gradstats, every {EVERY}th step", every=EVERY), cycle=EVERY),
    "ours-fraction": few(
        ours(f"gradstats, 1/{round(1 / FRACTION)} of the examples", fraction=FRACTION), tolerance=None
    ),
    "ours-random_sign": few(estimate("gradstats, random signs", Signs)),
    "ours-microbatch": few(estimate(f"gradstats, {PARTS} micro-batches", lambda problem: Micro(problem, PARTS))),
    "ours-single": few(Contestant("gradstats, micro-batches of one", "second_moment", Micro)),
    "ours-vmap": few(ours("gradstats, engine vmap", engine="vmap")),
    "ours-opacus": few(ours("gradstats, engine opacus", engine="opacus")),
    "backpack-second_moment": backpack("SumGradSquared", "second_moment"),
    "backpack-norms": backpack("BatchL2Grad", "norms"),
    "backpack-variance": few(backpack("Variance", "variance")),
    "opacus-second_moment": peer("Opacus, hooks", "second_moment", Opacus, "second_moment"),
    "opacus-norms": few(peer("Opacus, hooks", "norms", Opacus, "norms")),
    "opacus-functorch": few(peer("Opacus, functorch", "second_moment", Opacus, "second_moment", True)),
    "opacus-ghost": peer("Opacus, ghost clipping", "norms", Ghost),
    "func-whole": peer("torch.func, all at once", "second_moment", Func),
    "func-chunked": few(peer(f"torch.func, {ROWS} at a time", "second_moment", Func, ROWS)),
    "loop": few(peer("a loop over examples", "second_moment", Loop)),
    "microbatches": estimate(f"{PARTS} micro-batches", lambda problem: Microbatches(problem, PARTS)),
    "plain-compiled": few(Contestant("plain torch, compiled", "", COMPILED_PLAIN)),
    "ours-compiled": few(ours("gradstats, compiled, against plain compiled", compiled=True), baseline=COMPILED_PLAIN),
}
SCALED = ("ours-second_moment", "ours-norms")  # along the scales


def is_ours(name: str) -> bool:
    return name.startswith("ours-")


def reference(name: str) -> Make:
    """What its statistics are checked against: ours against a loop over examples, peers against ours."""
    names = CONTESTANTS[name].statistics
    if not names:
        return Plain
    return lambda problem: Loop(problem, *names) if is_ours(name) else Attached(problem, *names)
