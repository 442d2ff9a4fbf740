"""What the project asks of its own prices, and what a run says to it."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from experiments.benchmarks.contestants import CONTESTANTS, EVERY, is_ours
from experiments.benchmarks.results import Row

What = Literal["time", "memory"]
WHAT: tuple[What, ...] = ("time", "memory")

# Words of what the run was measured with.
CPU = {"device": "cpu", "dtype": "float32", "threads": "2"}
H200 = {"device": "cuda", "dtype": "bfloat16", "processor": "H200"}

EXACT, SAMPLED, ONE_BY_ONE, LOOP = "ours-second_moment", "ours-every", "ours-single", "loop"
BESIDE_PEERS = (EXACT, "ours-norms", "ours-variance")
SLACK = 0.02  # of the plain step's time, for steps in which nothing is gathered
EXPLANATION = (
    "Limits of time over the plain step's, and of memory above it in units of the bytes of all parameters, in which a "
    "percentage is one of such a buffer: one buffer + 10% is 1.10, and 5% is 0.05. Memory is compared at the two "
    f"decimals shown. With r the time of the exact second moment in the same run, every {EVERY}th step may take "
    f"1 + (r - 1)/{EVERY} + {SLACK}, and what the exact one may of memory. Other libraries and loops are to be beaten: "
    "the limit is the best of those that are right about the same statistic. Cannot be judged: quartiles reach across "
    "the limit or its own quartiles, or another's memory is the same."
)


@dataclass(frozen=True)
class Bar:
    workload: str
    contestant: str
    time: float
    memory: float
    on: Mapping[str, str]


BARS = (
    Bar("mlp", EXACT, 1.50, 1.00, CPU),
    Bar("mlp", "ours-bf16", 1.25, 1.00, CPU),
    Bar("gpt", EXACT, 1.20, 1.10, CPU),
    Bar("gpt2_block", EXACT, 1.20, 1.10, CPU),
    Bar("resnet18", EXACT, 1.50, 1.10, CPU),
    Bar("gpt", "ours-norms", 1.15, 0.05, CPU),
    Bar("gpt2_small", EXACT, 1.15, 1.05, H200),
)


class Quartiles(NamedTuple):
    """Three times the same of what does not vary."""

    lower: float
    median: float
    upper: float


Found = Quartiles | str  # or why there is nothing


@dataclass(frozen=True)
class Judged:
    """`rival`: whose value the limit is, which then has to be beaten, not just kept."""

    workload: str
    contestant: str
    what: What
    limit: Found
    measured: Found
    rival: str = ""

    @property
    def verdict(self) -> str:
        """One verdict only where the quartiles of both are apart."""
        if isinstance(self.measured, str):
            return f"not measured: {self.measured}"
        if isinstance(self.limit, str):
            return f"not measured: {self.limit}"
        keeps = operator.lt if self.rival else operator.le
        if keeps(self.measured.upper, self.limit.lower):
            return "holds"
        return "does not hold" if self.measured.lower > self.limit.upper else "cannot be judged"


def judged(rows: Sequence[Row], about: Mapping[str, Any]) -> list[Judged]:
    return [*of_table(rows, about), *of_sampled(rows, about), *of_peers(rows), *of_loop(rows)]


def of_table(rows: Sequence[Row], about: Mapping[str, Any]) -> Iterator[Judged]:
    for bar in BARS:
        for what in WHAT:
            limit = always(bar.time if what == "time" else bar.memory)
            measured = found(rows, bar.workload, bar.contestant, what)
            yield Judged(bar.workload, bar.contestant, what, limit, lacking(bar.on, about) or measured)


def of_sampled(rows: Sequence[Row], about: Mapping[str, Any]) -> Iterator[Judged]:
    """Where it takes part by itself, and where it was asked for."""
    memory = {bar.workload: bar.memory for bar in BARS if bar.contestant == EXACT and bar.on == CPU}
    asked = [r.workload for r in rows if r.contestant == SAMPLED]
    for workload in dict.fromkeys([*CONTESTANTS[SAMPLED].only, *asked]):
        exact = found(rows, workload, EXACT, "time")
        limit: Found = exact if isinstance(exact, str) else Quartiles(*(1 + (r - 1) / EVERY + SLACK for r in exact))
        limits: dict[What, Found] = {"time": limit}
        if workload in memory:
            limits["memory"] = always(memory[workload])
        for what, limit in limits.items():
            measured = found(rows, workload, SAMPLED, what)
            yield Judged(workload, SAMPLED, what, limit, lacking(CPU, about) or measured)


def of_peers(rows: Sequence[Row]) -> Iterator[Judged]:
    for workload in dict.fromkeys(r.workload for r in rows):
        for contestant in BESIDE_PEERS:
            rivals = peers(rows, workload, CONTESTANTS[contestant].statistic)
            for what in WHAT if rivals else ():
                rival, limit = best(rivals, what)
                yield Judged(workload, contestant, what, limit, found(rows, workload, contestant, what), rival)


def of_loop(rows: Sequence[Row]) -> Iterator[Judged]:
    """A loop over examples is to be beaten by micro-batches of one: both hold the activations of one example, which no
    pass over a batch can undercut."""
    for workload in (r.workload for r in rows if r.contestant == LOOP):
        for what in WHAT:
            limit, measured = (found(rows, workload, who, what) for who in (LOOP, ONE_BY_ONE))
            yield Judged(workload, ONE_BY_ONE, what, limit, measured, CONTESTANTS[LOOP].title)


def peers(rows: Iterable[Row], workload: str, statistic: str) -> list[Row]:
    """Who else claims to give the statistic exactly, failed ones included."""
    return [
        r
        for r in rows
        if (r.workload, r.statistic) == (workload, statistic)
        and not is_ours(r.contestant)
        and CONTESTANTS[r.contestant].tolerance is not None
    ]


def best(rivals: Sequence[Row], what: What) -> tuple[str, Found]:
    """Its title, and its quartiles; without any that is right, what became of each."""
    known = [(r.title, value) for r in rivals if not isinstance(value := quartiles(r, what), str)]
    if known:
        return min(known, key=lambda one: one[1].median)
    return "", "; ".join(f"{r.title}: {quartiles(r, what)}" for r in rivals) or "no peer in this run"


def found(rows: Iterable[Row], workload: str, contestant: str, what: What) -> Found:
    key = workload, contestant
    return next((quartiles(r, what) for r in rows if (r.workload, r.contestant) == key), "not in this run")


def quartiles(row: Row, what: What) -> Found:
    if row.error is not None:
        return row.error
    if row.statistic_error is not None and row.statistic_error < CONTESTANTS[row.contestant].at_least:
        return "nothing was rounded"
    if what == "memory":
        return "no memory" if row.above is None else always(round(row.above, 2))
    if row.lower is None or row.ratio is None or row.upper is None:
        return "no time"
    return Quartiles(row.lower, row.ratio, row.upper)


def always(value: float) -> Quartiles:
    return Quartiles(value, value, value)


def lacking(on: Mapping[str, str], about: Mapping[str, Any]) -> str:
    """What a bar asks for that the run was not measured with; "cuda:1" has the words cuda and 1."""
    wanted = [f"{key} {word}" for key, word in on.items() if word not in str(about[key]).replace(":", " ").split()]
    return f"asks for {', '.join(wanted)}" if wanted else ""
