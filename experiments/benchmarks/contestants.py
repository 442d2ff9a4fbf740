"""Who takes part: every row of the table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from experiments.benchmarks.peers import BackPACK, Func, Ghost, Loop, Microbatches, Opacus
from experiments.benchmarks.stepper import ALL, Attached, Micro, Plain, Signs, Stepper
from experiments.benchmarks.workloads import Problem

EVERY = 8
PARTS = 8
ROWS = 16
EXACT = 1e-3  # relative error, in float32
ROUNDED = 5e-2  # of bfloat16
COMPILED = ("mlp", "gpt", "resnet18")

Make = Callable[[Problem], Stepper]


@dataclass(frozen=True)
class Contestant:
    """`tolerance`: the relative error up to which its statistic counts as correct, None for an estimate; `cycle`: steps
    that repeat, and so are timed as one; `baseline`: what its time is divided by; `only`: workloads, unless the
    contestant is named."""

    title: str
    statistic: str  # "" for none
    make: Make
    tolerance: float | None = EXACT
    cycle: int = 1
    baseline: Make = Plain
    only: tuple[str, ...] = ()

    @property
    def statistics(self) -> tuple[str, ...]:
        return {"": (), "all": ALL}.get(self.statistic, (self.statistic,))


def ours(
    title: str, statistic: str = "second_moment", tolerance: float | None = EXACT, cycle: int = 1, **options: Any
) -> Contestant:
    names = ALL if statistic == "all" else (statistic,)
    return Contestant(title, statistic, lambda problem: Attached(problem, *names, **options), tolerance, cycle)


def peer(title: str, statistic: str, make: Callable[..., Stepper], *arguments: object) -> Contestant:
    return Contestant(title, statistic, lambda problem: make(problem, *arguments))


COMPILED_PLAIN = partial(Plain, compiled=True)
CONTESTANTS = {
    "plain": Contestant("plain torch, against itself", "", Plain),
    "ours-second_moment": ours("gradstats"),
    "ours-norms": ours("gradstats", "norms"),
    "ours-variance": ours("gradstats", "variance"),
    "ours-all": ours("gradstats", "all"),
    "ours-bf16": ours("gradstats, statistics in bf16", tolerance=ROUNDED, statistics_dtype=torch.bfloat16),
    "ours-every": ours(f"gradstats, every {EVERY}th step", cycle=EVERY, every=EVERY),
    "ours-fraction": ours(f"gradstats, 1/{EVERY} of the examples", tolerance=None, fraction=1 / EVERY),
    "ours-random_sign": Contestant("gradstats, random signs", "second_moment", Signs, tolerance=None),
    "ours-microbatch": Contestant(
        f"gradstats, {PARTS} micro-batches", "second_moment", lambda problem: Micro(problem, PARTS), tolerance=None
    ),
    "ours-vmap": ours("gradstats, engine vmap", engine="vmap"),
    "ours-opacus": ours("gradstats, engine opacus", engine="opacus"),
    "backpack-second_moment": peer("BackPACK, SumGradSquared", "second_moment", BackPACK, "second_moment"),
    "backpack-norms": peer("BackPACK, BatchL2Grad", "norms", BackPACK, "norms"),
    "backpack-variance": peer("BackPACK, Variance", "variance", BackPACK, "variance"),
    "opacus-second_moment": peer("Opacus, hooks", "second_moment", Opacus, "second_moment"),
    "opacus-norms": peer("Opacus, hooks", "norms", Opacus, "norms"),
    "opacus-functorch": peer("Opacus, functorch", "second_moment", Opacus, "second_moment", True),
    "opacus-ghost": peer("Opacus, ghost clipping", "norms", Ghost),
    "func-whole": peer("torch.func, all at once", "second_moment", Func),
    "func-chunked": peer(f"torch.func, {ROWS} at a time", "second_moment", Func, ROWS),
    "loop": peer("a loop over examples", "second_moment", Loop),
    "microbatches": Contestant(
        f"{PARTS} micro-batches", "second_moment", lambda problem: Microbatches(problem, PARTS), tolerance=None
    ),
    "plain-compiled": Contestant("plain torch, compiled", "", COMPILED_PLAIN, only=COMPILED),
    "ours-compiled": Contestant(
        "gradstats, compiled, against plain compiled",
        "second_moment",
        lambda problem: Attached(problem, "second_moment", compiled=True),
        baseline=COMPILED_PLAIN,
        only=COMPILED,
    ),
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
