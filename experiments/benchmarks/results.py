"""Measurements on disk, so that a killed run continues, and what they come to."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradstats
from experiments.atomic import atomic_write
from experiments.benchmarks.contestants import CONTESTANTS
from experiments.benchmarks.measure import Measured
from experiments.benchmarks.turns import ratio

SOURCES = ("py", "cpp")
# The modules that a process which measures imports, beside the library; no optimizer takes part.
MEASURING = (
    "gpt.py",
    *(f"benchmarks/{name}.py" for name in ("contestants", "measure", "meter", "networks", "peers", "stepper")),
    *(f"benchmarks/{name}.py" for name in ("turns", "workloads")),
)


class Results:
    """Measurements by workload, contestant and kind, each written as soon as it is there.

    `about` is what they were measured with, and of: those of another machine, setting or code do not count.
    """

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path, self.about = path, about
        self.measured: dict[str, Measured] = {}
        self.dropped = 0
        if path.exists():
            found = json.loads(path.read_text())
            if found["about"] == about:
                self.measured = found["measured"]
            else:
                self.dropped = len(found["measured"])

    def __getitem__(self, key: tuple[str, str, str]) -> Measured | None:
        return self.measured.get(" ".join(key))

    def __setitem__(self, key: tuple[str, str, str], value: Measured) -> None:
        self.measured[" ".join(key)] = value
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.path) as file:
            file.write((json.dumps({"about": self.about, "measured": self.measured}, indent=1) + "\n").encode())

    def error(self, workload: str, contestant: str) -> str | None:
        """The first that was found."""
        errors = (m["error"] for _, _, m in self.of(workload, contestant) if "error" in m)
        return next(errors, None)

    def of(self, workload: str, contestant: str) -> Iterable[tuple[str, str, Measured]]:
        return [found for found in self.all() if found[:2] == (workload, contestant)]

    def all(self) -> Iterable[tuple[str, str, Measured]]:
        for key, value in self.measured.items():
            workload, contestant, _ = key.split()
            yield workload, contestant, value


def code() -> str:
    """A digest of the sources that decide what is measured."""
    library, experiments = Path(gradstats.__file__).parent, Path(__file__).parents[1]
    found = sorted(path for kind in SOURCES for path in library.rglob(f"*.{kind}"))
    digest = hashlib.sha256()
    for path in [p for p in found if library / "optim" not in p.parents] + [experiments / name for name in MEASURING]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Row:
    """Of one contestant on one workload; milliseconds are medians over steps, the ratio is that of pairs of steps.

    `peak` in bytes; `above`: by how much it is above plain torch, in bytes of all parameters; what was not measured is
    None, and `error` says why.
    """

    workload: str
    contestant: str
    title: str
    statistic: str
    error: str | None = None
    plain_ms: float | None = None
    ms: float | None = None
    lower: float | None = None
    ratio: float | None = None
    upper: float | None = None
    pairs: int = 0
    processes: int = 0
    peak: int | None = None
    above: float | None = None
    resident: int | None = None
    statistic_error: float | None = None


def row(results: Results, workload: str, contestant: str) -> Row:
    one = CONTESTANTS[contestant]
    told: dict[str, Any] = {}
    found = [m for _, _, m in results.of(workload, contestant)]
    times = [m for m in found if "seconds" in m]
    if times:
        plain = [s / m["cycle"] for m in times for s in m["plain"]]
        own = [s / m["cycle"] for m in times for s in m["seconds"]]
        told |= {"plain_ms": 1e3 * statistics.median(plain), "ms": 1e3 * statistics.median(own)}
        lower, middle, upper = ratio(own, plain)
        told |= {"lower": lower, "ratio": middle, "upper": upper, "pairs": len(own), "processes": len(times)}
    for m in found:
        if "peak" in m:
            told |= {"peak": m["peak"], "resident": m["resident"]}
            plain_memory = results[workload, "plain", "memory"]
            if plain_memory is not None and "peak" in plain_memory:
                told["above"] = (m["peak"] - plain_memory["peak"]) / m["parameters"]
        told |= {key: m[key] for key in ("statistic_error",) if key in m}
    return Row(workload, contestant, one.title, one.statistic, results.error(workload, contestant), **told)
