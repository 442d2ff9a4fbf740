"""What a measurement was taken with."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from experiments.benchmarks import machine as module
from experiments.benchmarks.machine import machine, peers, save


def test_machine_is_told() -> None:
    told = machine(3)
    assert told["threads"] == 3 and told["torch"] == torch.__version__ and told["processor"]
    assert told["instructions"] == torch.backends.cpu.get_cpu_capability()


def test_peers_are_those_that_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PEERS", ("pytest", "no-such-package"))
    assert peers() == {"pytest": pytest.__version__}


@dataclass
class One:
    x: int


def test_results_are_saved_with_the_machine(tmp_path: Path) -> None:
    path = tmp_path / "new" / "found.json"
    save(path, 2, [One(1), One(2)], "cpu")
    written = json.loads(path.read_text())
    assert written["results"] == [{"x": 1}, {"x": 2}] and written["machine"]["threads"] == 2
