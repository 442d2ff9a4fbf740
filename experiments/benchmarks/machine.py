"""What a measurement was taken with, and what all benchmarks do with what they measured."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import gradstats
from experiments.atomic import atomic_write
from gradstats.native import build

PEERS = ("opacus", "backpack-for-pytorch")


def machine(threads: int, device: str = "cpu") -> dict[str, Any]:
    on_cuda = torch.device(device).type == "cuda"
    instructions = {} if on_cuda else {"instructions": torch.backends.cpu.get_cpu_capability()}
    return {
        "processor": torch.cuda.get_device_name(device) if on_cuda else processor(),
        **instructions,  # of processors of one name, some have wider vectors
        **compiler(),  # which makes kernels of ours, and so decides ratios
        "threads": threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **versions(["triton"]),
        "gradstats": gradstats.__version__,
    }


def processor() -> str:
    """Its model where the system tells, else its kind."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def compiler() -> dict[str, str]:
    """The first line that it says of itself; nothing where native kernels have none."""
    command = build.compiler()
    if command is None:
        return {}
    told = subprocess.run([command, "--version"], capture_output=True, text=True, check=False).stdout.splitlines()
    return {"compiler": told[0] if told else Path(command).name}


def peers() -> dict[str, str]:
    """Libraries to compare with."""
    return versions(PEERS)


def versions(names: Iterable[str]) -> dict[str, str]:
    """Of those that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def save(output: Path, threads: int, results: Sequence[Any], device: str = "cpu") -> None:
    """Results, which are dataclasses, and the machine that they were measured on."""
    output.parent.mkdir(parents=True, exist_ok=True)
    written = {"machine": machine(threads, device), "results": [asdict(result) for result in results]}
    with atomic_write(output) as file:
        file.write((json.dumps(written, indent=2) + "\n").encode())
    print(f"written: {output}")
