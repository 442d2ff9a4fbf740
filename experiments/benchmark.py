"""The price of the statistics: time and memory of a training step with them, beside the plain step and other libraries.

python -m experiments.benchmark                          the whole table and the scales: an hour or two on two cores
python -m experiments.benchmark mlp gpt -c 'ours-*'      two workloads, ours alone
python -m experiments.benchmark --quick                  tiny shapes, to see that everything runs
python -m experiments.benchmark --record                 measures, adds the run to docs/benchmark.json, writes the pages
python -m experiments.benchmark --record FILE            the same for a benchmark.json that was measured elsewhere
python -m experiments.benchmark gpt2_small --device cuda --dtype bfloat16

Every measurement has a fresh process. For time, steps of the contestant alternate with steps of plain torch, and a
ratio is taken pair by pair; processes of different contestants alternate too. Results are checked before they are
timed. The same command continues a run that was stopped.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from experiments.benchmarks import record
from experiments.benchmarks.contestants import CONTESTANTS
from experiments.benchmarks.machine import machine, peers
from experiments.benchmarks.report import Run, page
from experiments.benchmarks.results import Results, code
from experiments.benchmarks.run import Plan, run
from experiments.benchmarks.workloads import SCALES, WORKLOADS, Settings
from experiments.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MEASUREMENTS, TABLES, FIGURE, SUMMARY = "measurements.json", "benchmark.md", "benchmark.png", "benchmark.json"


def matching(patterns: Sequence[str], names: Iterable[str], kind: str) -> list[str]:
    """In the order of the names. Raises: UserError for a pattern without a match."""
    names = list(names)
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise UserError(f"no {kind} is called {pattern}: choose among {', '.join(names)}")
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def plan_of(arguments: argparse.Namespace) -> Plan:
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {arguments.device}: there is no CUDA device here")
    for name, least in (("steps", 2), ("processes", 1), ("threads", 1)):
        if getattr(arguments, name) < least:
            raise UserError(f"--{name}: {least} at least")
    on_cuda = arguments.device.startswith("cuda")
    everything = [*(name for name, w in WORKLOADS.items() if on_cuda or not w.large), *SCALES]
    chosen = matching(arguments.workloads, [*WORKLOADS, *SCALES], "workload") if arguments.workloads else everything
    contestants = matching(arguments.contestants or ["*"], CONTESTANTS, "contestant")
    return Plan(
        workloads=[name for name in chosen if name in WORKLOADS],
        scales=[name for name in chosen if name in SCALES],
        contestants=contestants,
        named=bool(arguments.contestants),
        settings=Settings(arguments.device, DTYPES[arguments.dtype], arguments.threads, arguments.quick),
        steps=2 if arguments.quick else arguments.steps,
        seconds=arguments.seconds,
        processes=1 if arguments.quick else arguments.processes,
        limit=arguments.limit,
    )


def about(plan: Plan) -> dict[str, Any]:
    """What a measurement depends on, beside its own name."""
    settings = plan.settings
    return {
        **machine(settings.threads, settings.device),
        **peers(),
        "device": settings.device,
        "dtype": str(settings.dtype).removeprefix("torch."),
        "quick": settings.quick,
        "steps": plan.steps,
        "seconds": plan.seconds,
        "code": code(),
    }


def measured(plan: Plan, output: Path) -> Run:
    """Runs what is missing, and writes tables and figure."""
    results = Results(output / MEASUREMENTS, about(plan))
    if results.dropped:
        print(f"{results.dropped} measurements in {results.path} are of another machine, setting or code: begun anew")
    run(plan, results)
    found = Run.of(results)
    record.write(output / SUMMARY, json.dumps(found.to_json(), indent=1) + "\n")
    record.write(output / TABLES, page(found) + "\n")
    drawn = [FIGURE] if record.draw(found, output / FIGURE) else []
    print("\n" + page(found) + "\n")
    print(f"written: {', '.join(str(output / name) for name in (SUMMARY, TABLES, *drawn))}")
    return found


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join([*WORKLOADS, *SCALES])
    parser.add_argument("workloads", nargs="*", help=f"names or patterns of: {names}")
    parser.add_argument("-c", "--contestants", nargs="+", help=f"names or patterns of: {', '.join(CONTESTANTS)}")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="bfloat16 by autocast")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of torch")
    parser.add_argument("--steps", type=int, default=20, help="measured pairs of steps in a process, at most")
    parser.add_argument("--seconds", type=float, default=1.5, help="after which a process stops at fewer pairs")
    parser.add_argument("--processes", type=int, default=2, help="that time a contestant")
    parser.add_argument("--limit", type=float, default=120, help="seconds after which a process is given up")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, two pairs of steps")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmark"))
    parser.add_argument("--record", nargs="?", const=True, metavar="FILE", help=f"keep the run in {record.RECORD}")
    parser.add_argument("--pages", action="store_true", help="measure nothing, write the pages from the record")
    return parser


def main() -> None:
    arguments = parser().parse_args()
    try:
        if not arguments.pages:
            recorded = isinstance(arguments.record, str)
            found = (
                record.load_run(Path(arguments.record)) if recorded else measured(plan_of(arguments), arguments.output)
            )
            if arguments.record:
                record.append(found)
        if arguments.pages or arguments.record:
            record.write_pages()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted: the same command continues", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
