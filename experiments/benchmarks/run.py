"""Which measurements there are to be, in which order, and taking them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.benchmarks import processes
from experiments.benchmarks.contestants import CONTESTANTS, SCALED
from experiments.benchmarks.measure import SETTLED, Measured, check, on_cuda, peak_memory, time_steps
from experiments.benchmarks.results import Results
from experiments.benchmarks.turns import ratio
from experiments.benchmarks.workloads import SCALES, WORKLOADS, Settings, point

Key = tuple[str, str, str]


@dataclass(frozen=True)
class Plan:
    """`workloads` of the table and `scales`; `named`: contestants that were asked for by name."""

    workloads: Sequence[str]
    scales: Sequence[str]
    contestants: Sequence[str]
    named: bool
    settings: Settings
    steps: int
    seconds: float
    processes: int
    limit: float  # seconds of one process

    def jobs(self) -> Iterator[Key]:
        """By workload: checks and memory first, then times, the processes of a contestant far from each other."""
        for workload in self.workloads:
            contestants = [name for name in self.contestants if self.takes(name, workload)]
            for contestant in contestants:
                yield workload, contestant, "check"
                yield workload, contestant, "memory"
            for i in range(self.processes):
                for contestant in contestants:
                    yield workload, contestant, f"time{i}"
        for scale in self.scales:
            for value in SCALES[scale].points(self.settings):
                for contestant in SCALED:
                    yield point(scale, value), contestant, "time0"

    def takes(self, contestant: str, workload: str) -> bool:
        """All that are asked for by name; else those that belong there."""
        workloads, contestants = CONTESTANTS[contestant].only, WORKLOADS[workload].only
        belongs = (not workloads or workload in workloads) and (not contestants or contestant in contestants)
        return self.named or belongs

    def measure(self, key: Key) -> Measured:
        workload, contestant, kind = key
        arguments: tuple[Any, ...] = (workload, contestant, self.settings)
        if kind.startswith("time"):
            arguments = (*arguments, self.steps, self.seconds)
        function = {"check": check, "memory": peak_memory}.get(kind, time_steps)
        try:
            return processes.fresh(function, *arguments, limit=self.limit, bounded=not on_cuda(self.settings))
        except processes.Failed as failed:
            return {"error": str(failed)}


def run(plan: Plan, results: Results) -> None:
    """Takes what is missing, a line of progress each."""
    jobs = list(plan.jobs())
    kept = sum(results[key] is not None for key in jobs)
    if kept:
        print(f"{kept} of {len(jobs)} measurements are kept: {results.path}", flush=True)
    begun = time.perf_counter()
    for i, key in enumerate(jobs):
        if results[key] is not None or skipped(results, key):
            continue
        measured = plan.measure(key)
        results[key] = measured
        print(
            f"[{i + 1}/{len(jobs)}] {time.perf_counter() - begun:4.0f} s  {' '.join(key)}: {told(measured)}", flush=True
        )


def skipped(results: Results, key: Key) -> bool:
    """What failed is not measured further, and what is slow not again."""
    workload, contestant, kind = key
    if results.error(workload, contestant) is not None:
        return True
    first = results[workload, contestant, "time0"]
    return kind.startswith("time") and first is not None and middle(first) > SETTLED


def middle(times: Measured) -> float:
    return ratio(times["seconds"], times["plain"])[1]


def told(measured: Measured) -> str:
    if "error" in measured:
        return measured["error"]
    if "seconds" in measured:
        return f"{middle(measured):.2f} times plain"
    if "peak" in measured:
        return f"{measured['peak'] / 2**20:.0f} MiB"
    return f"right, {measured['statistic_error']:.1e} off"
