"""The price of an optimizer step, beside torch's own AdamW: fused, foreach and one tensor after the other.

python -m experiments.optimizer_benchmark                               Adam, 10 and 100 million parameters, two shapes
python -m experiments.optimizer_benchmark --optimizers all --steps 20   every optimizer of conf/optimizer that is ours
python -m experiments.optimizer_benchmark --parameters 1e6 --shapes mlp

Gradients and statistics are those of one backward pass. Each line of the table is a duel in a fresh process: fused
AdamW and one other step the same parameters in turns, so that a change of the machine's speed meets both alike; a ratio
is taken step by step, and its median and quartiles are shown. No third one takes part: the plain forms give gigabytes
back to the system at every step, and who comes after them pays for it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from experiments.benchmarks.machine import machine, save
from experiments.benchmarks.turns import alternate, ratio
from experiments.config import CONF, compose_config
from experiments.documents import Table, fill_document, markdown
from experiments.gpt import GPT
from experiments.optimizers import OURS, attach_statistics, build_optimizer, stepper
from experiments.schemas.optimizer import OptimizerConfig
from gradstats.optim.base import ExampleOptimizer

BATCH = 16
TUNED = BATCH // 2  # R < B: all that a batch gives is read, and no more is kept than Adam keeps
POSITIONS = 8
HEAD = 64  # GPT-2's width of a head, and with it its ratio of width to depth
BASELINE = "fused"
TORCH = {
    BASELINE: partial(AdamW, fused=True),
    "foreach": partial(AdamW, foreach=True),
    "for-loop": partial(AdamW, foreach=False, fused=False),
}

METHODS = sorted(path.stem for path in CONF.glob("optimizer/*.yaml"))
FORMS = {"compiled": True, "plain": False}  # of ours


def gpt(parameters: int) -> tuple[nn.Module, Tensor]:
    """As many layers as fit, the words taking what they leave; a dozen tensors a layer, half of them small."""
    layers = max(1, int((parameters / (12 * HEAD**2)) ** (1 / 3)))
    width = HEAD * layers
    words = max(2, (parameters - 12 * layers * width**2) // width - POSITIONS)
    tokens = torch.randint(0, words, (BATCH, POSITIONS))
    return GPT(words, width, layers, heads=layers, positions=POSITIONS, tied=True), tokens


def mlp(parameters: int) -> tuple[nn.Module, Tensor]:
    """Three square matrices, and their biases."""
    width = int((parameters / 3) ** 0.5)
    layers = [nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)]
    return nn.Sequential(*layers), torch.randn(BATCH, width)


SHAPES: dict[str, Callable[[int], tuple[nn.Module, Tensor]]] = {"gpt": gpt, "mlp": mlp}


@dataclass(frozen=True)
class Measurement:
    """Milliseconds are a median; `ratio` to fused AdamW is the median over steps, between its quartiles."""

    shape: str
    parameters: int
    tensors: int
    contestant: str
    path: str
    milliseconds: float
    lower: float
    ratio: float
    upper: float
    state_bytes_per_parameter: float
    steps: int


def duellists(parameters: Sequence[Tensor], name: str, form: str) -> tuple[dict[str, Optimizer], OptimizerConfig]:
    """Fused AdamW, and another form of it or one of ours; with the configuration of that one."""
    found: dict[str, Optimizer] = {f"AdamW, {BASELINE}": TORCH[BASELINE](parameters)}
    config = replace(compose_config([f"optimizer={name}"]).optimizer, batch_size=TUNED)
    if form in TORCH:
        found[f"AdamW, {form}"] = TORCH[form](parameters)
    else:
        optimizer = build_optimizer(parameters, config, BATCH, None)
        assert isinstance(optimizer, ExampleOptimizer)
        optimizer.compiled = FORMS[form]
        found[f"{config.name}, {form}"] = optimizer
    return found, config


def measure(
    shape: str, parameters: int, name: str, form: str, steps: int, threads: int, warmup: int = 3
) -> list[Measurement]:
    """Of one duel."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model, x = SHAPES[shape](parameters)
    tensors = list(model.parameters())
    optimizers, config = duellists(tensors, name, form)
    handle = attach_statistics(model, list(optimizers.values())[-1], config)
    model(x).square().mean().backward()
    told = BATCH if handle is None else None
    takers = {contestant: stepper(optimizer, told) for contestant, optimizer in optimizers.items()}
    seconds: dict[str, list[float]] = {contestant: [] for contestant in optimizers}
    turns = alternate(optimizers)
    for i in track(range(warmup + steps), f"{shape}, {parameters:,}: {list(optimizers)[-1]}", transient=True):
        for contestant in next(turns):
            start = time.perf_counter()
            takers[contestant]()
            elapsed = time.perf_counter() - start
            if i >= warmup:
                seconds[contestant].append(elapsed)
    size = sum(p.numel() for p in tensors)
    found = []
    for contestant, optimizer in optimizers.items():
        lower, middle, upper = ratio(seconds[contestant], seconds[f"AdamW, {BASELINE}"])
        milliseconds = 1e3 * statistics.median(seconds[contestant])
        path = optimizer.path if isinstance(optimizer, ExampleOptimizer) else "torch"
        state = state_bytes(optimizer) / size
        found.append(
            Measurement(shape, size, len(tensors), contestant, path, milliseconds, lower, middle, upper, state, steps)
        )
    return found


def state_bytes(optimizer: Optimizer) -> int:
    return sum(t.nbytes for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor))


def is_ours(name: str) -> bool:
    return type(compose_config([f"optimizer={name}"]).optimizer) in OURS


def tables_of(found: Sequence[Measurement]) -> list[Table]:
    """One for each model; fused AdamW is that of the first duel."""
    models: dict[tuple[str, int, int], dict[str, Measurement]] = {}
    for m in found:
        models.setdefault((m.shape, m.parameters, m.tensors), {}).setdefault(m.contestant, m)
    return [
        Table(
            f"{shape}, {parameters:,} parameters in {tensors} tensors",
            f"Medians over {found[0].steps} steps; ratios to fused AdamW in the same duel; state in bytes a parameter.",
            ["optimizer", "ms", "ratio", "quartiles", "state"],
            [
                [
                    m.contestant,
                    f"{m.milliseconds:.1f}",
                    f"{m.ratio:.2f}",
                    f"{m.lower:.2f} to {m.upper:.2f}",
                    f"{m.state_bytes_per_parameter:.0f}",
                ]
                for m in rows.values()
            ],
            emphasised=(),
        )
        for (shape, parameters, tensors), rows in models.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", nargs="+", type=float, default=[10e6, 100e6], help="sizes of the models")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--optimizers", nargs="+", default=["batch_invariant_adam"], help="of conf/optimizer, or all")
    parser.add_argument("--steps", type=int, default=20, help="measured steps of each contestant")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of torch")
    parser.add_argument("--output", type=Path, default=Path("outputs/optimizer_benchmark.json"))
    parser.add_argument("--document", type=Path, help="a file to write the table into, between its markers")
    arguments = parser.parse_args()
    if arguments.steps < 2:
        parser.error("--steps: quartiles need at least 2")
    names = METHODS if arguments.optimizers == ["all"] else arguments.optimizers
    if unknown := [name for name in names if name not in METHODS]:
        parser.error(f"--optimizers: {', '.join(unknown)}: choose all or some of {', '.join(METHODS)}")
    names = [name for name in names if is_ours(name)]
    if not names:
        parser.error(f"--optimizers: {', '.join(arguments.optimizers)} is torch's; what is measured is ours")
    rivals = [(name, form) for name in names for form in FORMS]
    rivals += [("adam", form) for form in TORCH if form != BASELINE]
    models = [(shape, int(size)) for size in arguments.parameters for shape in arguments.shapes]
    jobs = [(*model, *rival) for model in models for rival in rivals]
    context = multiprocessing.get_context("spawn")
    found: list[Measurement] = []
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as processes:
        for job in jobs:
            found += processes.submit(measure, *job, arguments.steps, arguments.threads).result()

    for table in tables_of(found):
        Console().print(table.rich())
    save(arguments.output, arguments.threads, found)
    if arguments.document is not None:
        told = ", ".join(f"{key} {value}" for key, value in machine(arguments.threads).items())
        written = "\n\n".join([*map(markdown, tables_of(found)), f"Measured on: {told}."])
        fill_document(arguments.document, "price", written)


if __name__ == "__main__":
    # By its importable name: the fresh processes could not import the function from __main__.
    from experiments import optimizer_benchmark as importable

    importable.main()
