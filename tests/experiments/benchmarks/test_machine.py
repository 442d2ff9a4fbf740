"""What a measurement was taken with."""

from __future__ import annotations

import json
import sys
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


@pytest.mark.skipif(sys.platform != "linux", reason="native kernels are compiled on Linux")
@pytest.mark.parametrize(("says", "expected"), [("clang 99.1\nTarget: abacus", "clang 99.1"), ("", "compiler")])
def test_compiler_of_native_kernels_is_told(
    says: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By itself, or else by its name."""
    command = tmp_path / "compiler"
    command.write_text(f"#!/bin/sh\n[ $1 = --version ] && echo '{says}'" if says else "#!/bin/sh\nexit 1")
    command.chmod(0o700)
    monkeypatch.setenv("CXX", str(command))
    assert machine(3)["compiler"] == expected


def test_what_is_not_there_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.build, "compiler", lambda: None)
    monkeypatch.setattr(module, "versions", lambda names: {})
    assert not {"compiler", "triton"} & set(machine(3))


def test_version_of_triton_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "version", lambda name: {"triton": "99"}[name])
    assert machine(3)["triton"] == "99"


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
