"""What a training step will take, computed before anything is trained: memory, communication, FLOPs, overhead.

python -m experiments.plan experiment=digits world_size=8
python -m experiments.plan experiment=gpu_gpt2 train.batch_size=256 world_size=8 parallel=fsdp

Takes what experiments.train takes, and how many ranks share the batch: world_size (1) and parallel (ddp, or fsdp).
Nothing is allocated: a model of billions of parameters takes seconds. Written to outputs/plan.json and outputs/plan.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

import torch
from hydra.errors import HydraException
from omegaconf import OmegaConf
from rich.console import Console
from torch._subclasses.fake_tensor import FakeTensorMode

from experiments.atomic import atomic_write
from experiments.config import compose_config
from experiments.documents import Cell, Table, markdown
from experiments.errors import UserError, command_line
from experiments.planning.layers import Layer, price
from experiments.planning.overhead import prices
from experiments.planning.ranks import Memory, Traffic, memory, traffic
from experiments.planning.setting import setting
from experiments.planning.trace import Step, plain
from experiments.schemas.run import Config, Device

OTHER = "attention, recomputation, the rest"


class Parallel(StrEnum):
    ddp = "ddp"
    fsdp = "fsdp"


@dataclass
class Ranks:
    world_size: int = 1
    parallel: Parallel = Parallel.ddp


@dataclass(frozen=True)
class Flops:
    """Of forward and backward of one rank, by kind of layer: the plain step's, and what statistics add, the mean over
    steps where only every k-th gathers."""

    kind: str
    plain: int
    matmuls: float
    squares: float


@dataclass(frozen=True)
class Plan:
    """overhead: of a step's forward and backward, a ratio; None where no prices have been measured."""

    world_size: int
    parallel: str
    batch_size: int
    rows: int
    parameters: int
    memory: Memory
    traffic: list[Traffic]
    flops: list[Flops]
    overhead: float | None
    measured_on: str | None


def plan(config: Config, ranks: Ranks) -> Plan:
    """Raises: UserError for what no run can do, or no formula says."""
    if config.study is not None:
        raise UserError(
            "a study is many runs: give one of them, as experiment=digits with optimizer= and train.batch_size="
        )
    every = config.engine.every
    torch.set_num_threads(config.hardware.threads)
    with FakeTensorMode():
        one = setting(config, ranks.world_size, ranks.parallel is Parallel.fsdp)
        step = plain(one.model, one.loss)
        layers = price(step.calls, one.sums, config.device is Device.cuda)
        held = memory(one, step, layers)
        overhead, measured_on = 1.0, None
        if one.sums:
            found = prices()
            overhead, measured_on = 1 + (found.overhead(step, layers) - 1) / every, found.machine
    elsewhere = config.hardware.bf16 or config.device is Device.cuda
    return Plan(
        world_size=ranks.world_size,
        parallel=ranks.parallel.value,
        batch_size=one.batch_size,
        rows=one.rows,
        parameters=sum(p.numel() for p in one.parameters),
        memory=held,
        traffic=traffic(one, every),
        flops=flops(step, layers, every),
        overhead=None if elsewhere and one.sums else overhead,
        measured_on=None if elsewhere else measured_on,
    )


def flops(step: Step, layers: Sequence[Layer], every: int) -> list[Flops]:
    """By kind, then all that is of no kind."""
    rows = []
    for kind in dict.fromkeys(layer.call.kind for layer in layers):
        own = [layer for layer in layers if layer.call.kind == kind]
        works = [one for layer in own for one in layer.works]
        matmuls, squares = (sum(getattr(one, name) for one in works) / every for name in ("matmuls", "squares"))
        rows.append(Flops(kind, sum(layer.plain for layer in own), matmuls, squares))
    return [*rows, Flops(OTHER, step.flops - sum(row.plain for row in rows), 0, 0)]


def tables(found: Plan) -> list[Table]:
    shared = f"B = {found.batch_size}"
    if found.world_size > 1:
        shared += f" over {found.world_size} ranks ({found.parallel}), {found.rows} examples on the largest"
    about = f"{found.parameters:,} parameters; {shared}."
    return [of_memory(found, about), *([of_traffic(found)] if found.traffic else []), of_flops(found)]


def of_memory(found: Plan, about: str) -> Table:
    basis = {
        "activations": "traced, without torch.compile",
        "buffers": "formula: the largest at a time",
        "communication": "formula",
        "peak": "traced, with the formulas",
    }
    rows: list[list[Cell]] = [
        [name.replace("_", " "), size_of(size), basis.get(name, "formula")]
        for name, size in found.memory._asdict().items()
    ]
    told = f"{about} Gradients and statistics come as activations go: the peak is no sum."
    return Table("Memory of a rank", told, ["what", "size", "from"], rows, (len(rows) - 1,))


def of_traffic(found: Plan) -> Table:
    gradients = found.traffic[-1].plain
    rows: list[list[Cell]] = [
        [t.collective, size_of(t.plain), size_of(t.extra), f"{t.extra / gradients:.2f}"] for t in found.traffic
    ]
    told = "Bytes that collectives are given in a step, by formula; the ratio is to those of the gradients."
    return Table("Communication", told, ["collective", "plain", "statistics", "ratio"], rows, ())


def of_flops(found: Plan) -> Table:
    total = Flops("all", *(sum(getattr(row, name) for row in found.flops) for name in ("plain", "matmuls", "squares")))
    rows: list[list[Cell]] = [
        [row.kind, f"{row.plain:.3g}", f"{row.matmuls:.3g}", f"{row.squares:.3g}"] for row in (*found.flops, total)
    ]
    ratio = (total.plain + total.matmuls) / total.plain
    told = (
        "Of forward and backward of a rank. Plain: matmuls, convolutions and attention, as torch counts them; beside "
        "it, by formula, matmuls and squares of statistics. "
        f"Matmuls are {ratio:.3f} times the plain step's. {expected(found)}"
    )
    return Table("FLOPs", told, ["layers", "plain", "matmuls", "squares"], rows, (len(rows) - 1,))


def size_of(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"


def expected(found: Plan) -> str:
    if found.overhead is None:
        return (
            "What that is in time has been measured on a CPU in float32 only, and is not told for this configuration."
        )
    if found.measured_on is None:
        return "Nothing is gathered: the step is the plain one."
    return (
        f"Expected time of forward and backward: {found.overhead:.2f} times the plain step's, an estimate from prices "
        f"measured on {found.measured_on} (docs/benchmark.md), for models that do not mostly look up embeddings."
    )


def read(overrides: Sequence[str]) -> tuple[Config, Ranks]:
    """Raises: UserError for what does not compose."""
    own = [text for text in overrides if text.partition("=")[0] in Ranks.__dataclass_fields__]
    ranks = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Ranks), OmegaConf.from_dotlist(own)))
    assert isinstance(ranks, Ranks)
    try:
        return compose_config([text for text in overrides if text not in own]), ranks
    except HydraException as error:
        raise UserError(f"configuration: {error}") from error


def write(found: Plan, output: Path) -> None:
    written = asdict(found) | {
        "memory": found.memory._asdict(),
        "traffic": [t._asdict() for t in found.traffic],
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    for path, text in (
        (output, json.dumps(written, indent=2)),
        (output.with_suffix(".md"), "\n\n".join(map(markdown, tables(found)))),
    ):
        with atomic_write(path) as file:
            file.write(f"{text}\n".encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="as of experiments.train, and world_size=W, parallel=ddp or fsdp")
    parser.add_argument("--output", type=Path, default=Path("outputs/plan.json"), help="and beside it the same as .md")
    arguments = parser.parse_args()
    with command_line():
        found = plan(*read(arguments.overrides))
        console = Console()
        for table in tables(found):
            console.print(table.rich())
            console.print(table.explanation, markup=False, highlight=False)
            console.print()
        write(found, arguments.output)
        console.print(f"written: {arguments.output}, {arguments.output.with_suffix('.md')}", soft_wrap=True)


if __name__ == "__main__":
    main()
