"""Peak memory of a step with the exact second moment, beside the plain step: bytes of all living tensors, counted.

python -m experiments.memory                  a GPT-2-small-shaped step, some minutes; writes outputs/memory.json
python -m experiments.memory --layers 2 ...   a smaller one

A count of bytes does not depend on the allocator, as the process's size does, and is the same in every run. What single
operations allocate and free again inside is not seen, in either contestant.
"""

from __future__ import annotations

import argparse
import json
import platform
import weakref
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gradstats
from experiments.gpt import GPT

MIB = 2**20
ALLOWANCE = 0.1  # of the plain step's peak, beside one buffer shaped like the parameters


class LivingBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, as long as something holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: dict[int, Any] = {}  # by address of the storage object, kept to hear of its end

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, Tensor):
                self.add(t.untyped_storage())
        return result

    def add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.now += size
        self.peak = max(self.peak, self.now)

        def end(_: object) -> None:
            self.now -= size
            del self.known[key]

        self.known[key] = weakref.ref(storage, end)


@dataclass(frozen=True)
class Memory:
    """Peaks of tensors made during forward and backward, in MiB; parameters and inputs are beside them in both."""

    layers: int
    width: int
    words: int
    positions: int
    batch_size: int
    parameters: float
    plain: float
    attached: float

    @property
    def limit(self) -> float:
        return self.plain + self.parameters + ALLOWANCE * self.plain


def peak(model: nn.Module, tokens: Tensor) -> float:
    """MiB at the highest point of one step, its gradients included."""
    with LivingBytes() as counter:
        logits = model(tokens)
        F.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
    return counter.peak / MIB


def measure(layers: int, width: int, heads: int, words: int, positions: int, batch_size: int) -> Memory:
    torch.manual_seed(0)
    model = GPT(words, width, layers, heads, positions, tied=True)
    tokens = torch.randint(0, words, (batch_size, positions))
    parameters = sum(p.numel() * p.element_size() for p in model.parameters()) / MIB
    plain = peak(model, tokens)
    model.zero_grad()
    with gradstats.attach(model) as handle:
        handle.probe(tokens)
        attached = peak(model, tokens)
    return Memory(layers, width, words, positions, batch_size, parameters, plain, attached)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shape = {"layers": 12, "width": 768, "heads": 12, "words": 50_257, "positions": 256, "batch-size": 8}
    for name, value in shape.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--output", type=Path, default=Path("outputs/memory.json"))
    arguments = vars(parser.parse_args())
    output: Path = arguments.pop("output")
    found = measure(**arguments)
    table = Table("", "MiB")
    table.add_row("parameters", f"{found.parameters:.0f}")
    table.add_row("plain step", f"{found.plain:.0f}")
    table.add_row("with exact second moment", f"{found.attached:.0f}")
    table.add_row("plain + one buffer like the parameters + 10%", f"{found.limit:.0f}")
    Console().print(table)
    output.parent.mkdir(parents=True, exist_ok=True)
    machine = {"torch": torch.__version__, "machine": platform.machine()}
    output.write_text(json.dumps({**machine, **asdict(found), "limit": found.limit}, indent=1))


if __name__ == "__main__":
    main()
