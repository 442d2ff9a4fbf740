"""The cases of the kernels' benchmark at small sizes, interpreted where there is no device."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from experiments import kernel_benchmark
from experiments.kernel_benchmark import Case, adam, cases, linear, measure, normalization, rows, step

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL: dict[str, list[Callable[[], Case]]] = {
    "linear": [lambda: linear(2, 3, 17, 20, torch.float32, DEVICE)],
    "step": [lambda: step(2, 3, 17, 20, torch.float32, DEVICE)],
    "normalization": [lambda c=c: normalization(2, 3, 8, c, torch.float32, DEVICE) for c in (True, False)],
    "rows": [lambda: rows(2, 5, 7, 6, torch.float32, DEVICE)],
    "adam": [lambda: adam((5, 1, 40), torch.float32, DEVICE)],
}


@pytest.fixture(autouse=True)
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    def milliseconds(way: Callable[[], object]) -> float:
        start = time.perf_counter()
        way()
        return 1e3 * (time.perf_counter() - start)

    monkeypatch.setattr(kernel_benchmark, "milliseconds", milliseconds)
    monkeypatch.setattr("gradstats.kernels.multiprocessors", lambda device: 4)


@pytest.mark.parametrize(("kernel", "make"), [(kernel, make) for kernel, made in SMALL.items() for make in made])
def test_every_way_is_right(kernel: str, make: Callable[[], Case]) -> None:
    case = make()
    found = measure(kernel, case, "float32", turns=2)
    assert [m.way for m in found] == list(case.ways) and found[0].way == "torch" and found[0].ratio == 1
    for m in found:
        assert m.milliseconds > 0 and 0 < m.lower <= m.ratio <= m.upper
        assert all(0 <= error <= 2e-6 for error in m.errors)
        assert m.errors or (kernel == "adam" and m.way == "torch")
    assert any("triton" in m.way for m in found)


def test_cases_are_of_gpt2() -> None:
    assert {kernel: len(list(cases(kernel, 1, 1, torch.float32, "meta"))) for kernel in kernel_benchmark.KERNELS} == {
        "linear": 14,
        "step": 14,
        "normalization": 2,
        "rows": 1,
        "adam": 1,
    }
    assert sum(kernel_benchmark.SIZES) == pytest.approx(124_439_808, rel=1e-3)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["kernel_benchmark", *arguments])
    kernel_benchmark.main()


def test_without_a_device_it_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run(monkeypatch, "--output", str(tmp_path / "found.json"))
    assert "no CUDA device" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_output(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A case that does not fit is passed over; a result that is wrong is written, told, and fails the run."""

    def too_large() -> Case:
        raise torch.OutOfMemoryError

    def wrong() -> Case:
        return Case("wrong", {"torch": lambda: [torch.ones(3)]}, lambda: [torch.full((3,), 1.1)])

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("experiments.benchmarks.machine.machine", lambda threads, device: {"processor": device})
    made = [too_large, *SMALL["adam"], wrong]
    monkeypatch.setattr(kernel_benchmark, "cases", lambda *_: made)
    output = tmp_path / "found" / "kernels.json"
    with pytest.raises(SystemExit, match="errors above 0.01: wrong, torch"):
        run(monkeypatch, "--kernels", "adam", "--turns", "2", "--output", str(output))
    printed, written = capsys.readouterr().out, json.loads(output.read_text())
    assert "not enough memory" in printed and "46 parameters in 3 tensors" in printed
    assert written["machine"] == {"processor": "cuda"}
    assert [m["way"] for m in written["results"]] == ["torch", "triton", "torch"]
