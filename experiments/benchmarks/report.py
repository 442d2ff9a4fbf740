"""A run in words: a table for every workload, the slopes, and the few lines for a README."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from typing import Any

from experiments.benchmarks import bars
from experiments.benchmarks.contestants import CONTESTANTS, EVERY, is_ours
from experiments.benchmarks.results import Results, Row, row
from experiments.benchmarks.scaling import Growth, growths
from experiments.benchmarks.workloads import WORKLOADS
from experiments.documents import Table, markdown

DASH = "–"
LEGEND = (
    "Time: forward, backward and the statistic in hand, over the plain step that it alternates with; median over pairs "
    "of steps, and quartiles. Memory: peak of a step above that of a plain step, in units of the bytes of all "
    "parameters. Off: relative error of the statistic, ours against a loop over examples, others against ours (est.: "
    "an estimate); gradients are checked too. Who is wrong, or fails, has the reason in place of a time."
)
SETTINGS = (
    *("device", "dtype", "threads", "processor", "instructions", "compiler"),
    *("python", "torch", "triton", "gradstats", "opacus", "backpack-for-pytorch"),
)
QUICK = "Two pairs of steps of a tiny shape, to see that everything runs: these ratios tell no prices."
COMMAND = "python -m experiments.benchmark --record"
SUMMARY = {
    "second moment": bars.EXACT,
    f"every {EVERY}th step": bars.SAMPLED,
    "norms": "ours-norms",
    "all three": "ours-all",
}
COLUMNS = ["contestant", "statistic", "time", "quartiles", "pairs", "ms", "memory", "off"]


@dataclass(frozen=True)
class Run:
    """What is recorded: `about` says with what it was measured."""

    date: str
    about: dict[str, Any]
    rows: list[Row]
    growths: list[Growth]

    @classmethod
    def of(cls, results: Results) -> Run:
        measured = {(workload, contestant) for workload, contestant, _ in results.all()}
        rows = [row(results, w, c) for w in WORKLOADS for c in CONTESTANTS if (w, c) in measured]
        return cls(datetime.now(UTC).date().isoformat(), results.about, rows, growths(results))

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Run:
        return cls(
            found["date"],
            found["about"],
            [Row(**known(Row, r)) for r in found["rows"]],
            [Growth(**known(Growth, g)) for g in found["growths"]],
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def workloads(self) -> list[str]:
        return list(dict.fromkeys(r.workload for r in self.rows))

    def of_workload(self, workload: str) -> list[Row]:
        """Ours first."""
        return sorted((r for r in self.rows if r.workload == workload), key=lambda r: not is_ours(r.contestant))


def known(kind: type, found: dict[str, Any]) -> dict[str, Any]:
    """Records outlive columns."""
    return {f.name: found[f.name] for f in fields(kind) if f.name in found}


def tables(run: Run) -> list[Table]:
    found = [of_workload(run, workload) for workload in run.workloads]
    if run.growths:
        found.append(of_growths(run))
    return found if run.about["quick"] else [*found, of_bars(run)]  # what they ask of is full shapes


def of_workload(run: Run, workload: str) -> Table:
    rows = run.of_workload(workload)
    one = WORKLOADS[workload]
    shape = one.shape | (one.quick if run.about["quick"] else {})
    shown = ", ".join(f"{key} = {value:,}" for key, value in shape.items())
    told = f"{shown}. {QUICK}" if run.about["quick"] else f"{shown}."
    ours = tuple(i for i, r in enumerate(rows) if is_ours(r.contestant))
    return Table(one.title, told, COLUMNS, [cells(r) for r in rows], ours)


def cells(r: Row) -> list[Any]:
    statistic = r.statistic.replace("_", " ") or DASH
    if r.error is not None:
        return [r.title, statistic, r.error, *[DASH] * (len(COLUMNS) - 3)]
    return [
        r.title,
        statistic,
        number(r.ratio),
        DASH if r.ratio is None else between(r.lower, r.upper),
        str(r.pairs) if r.pairs else DASH,
        DASH if r.ms is None else f"{r.ms:.3g}",
        DASH if r.above is None else f"{r.above:+.2f}",
        off(r),
    ]


def number(value: float | None) -> str:
    """Two decimals, or as many digits as a large one deserves."""
    if value is None:
        return DASH
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"


def between(lower: float | None, upper: float | None) -> str:
    return f"{number(lower)} to {number(upper)}"


def off(r: Row) -> str:
    if r.statistic_error is None or not r.statistic:
        return DASH
    return "est." if CONTESTANTS[r.contestant].tolerance is None else f"{r.statistic_error:.0e}"


def of_growths(run: Run) -> Table:
    """At the ends of each scale, and the slopes of time against it in log-log."""
    return Table(
        "Scaling",
        "Time ~ x^slope, over all values; ratio to the plain step at the first and the last of them.",
        ["scale", "statistic", "from", "to", "ratio there", "slope, plain", "slope, ours"],
        [
            [
                f"{g.symbol}: {g.title}",
                g.statistic.replace("_", " "),
                str(g.values[0]),
                str(g.values[-1]),
                f"{number(g.ratio[0])}, {number(g.ratio[-1])}",
                f"{g.plain_slope:.2f}",
                f"{g.slope:.2f}",
            ]
            for g in run.growths
        ],
        emphasised=(),
    )


def of_bars(run: Run) -> Table:
    columns = ["workload", "contestant", "statistic", "what", "limit", "measured", "quartiles", "verdict"]
    rows = [verdict(one) for one in bars.judged(run.rows, run.about)]
    return Table("Bars", bars.EXPLANATION, columns, rows, emphasised=())


def verdict(one: bars.Judged) -> list[Any]:
    who, found, varies = CONTESTANTS[one.contestant], one.measured, one.what == "time"
    return [
        WORKLOADS[one.workload].title,
        who.title,
        who.statistic.replace("_", " "),
        one.what,
        limit(one),
        DASH if isinstance(found, str) else number(found.median),
        DASH if isinstance(found, str) or not varies else between(found.lower, found.upper),
        one.verdict,
    ]


def limit(one: bars.Judged) -> str:
    if isinstance(one.limit, str):
        return DASH
    return f"below {number(one.limit.median)} ({one.rival})" if one.rival else number(one.limit.median)


def told(run: Run) -> str:
    about = ", ".join(f"{key} {run.about[key]}" for key in SETTINGS if key in run.about)
    processes = max((r.processes for r in run.rows), default=0)
    measured = f"up to {processes} processes a contestant, and up to {run.about['steps']} pairs of steps in each"
    return f"Measured on {run.date}: {about}; {measured}."


def page(run: Run) -> str:
    return "\n\n".join([told(run), LEGEND, *map(markdown, tables(run))])


def summary(run: Run) -> str:
    """One line a workload: ours, and the best of those that are right."""
    lines = ["| workload | " + " | ".join(SUMMARY) + " | memory | best other: second moment | norms |"]
    lines.append("|" + "---|" * (len(SUMMARY) + 4))
    for workload in run.workloads:
        rows = {r.contestant: r for r in run.of_workload(workload)}
        mine = [number(r.ratio) if (r := rows.get(name)) else DASH for name in SUMMARY.values()]
        first = rows.get(bars.EXACT)
        memory = DASH if first is None or first.above is None else f"{first.above:+.2f}"
        others = [best(run, workload, name) for name in ("second_moment", "norms")]
        lines.append("| " + " | ".join([WORKLOADS[workload].title, *mine, memory, *others]) + " |")
    return "\n".join([*lines, "", f"`{COMMAND}` makes this table. {told(run)}"])


def best(run: Run, workload: str, statistic: str) -> str:
    rival, time = bars.best(bars.peers(run.rows, workload, statistic), "time")
    return DASH if isinstance(time, str) else f"{number(time.median)} ({rival})"
