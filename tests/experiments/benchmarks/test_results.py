"""From measurements to rows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from experiments.benchmarks import results as module
from experiments.benchmarks.results import Results, code, row


def test_rows_pool_pairs_of_all_processes(tmp_path: Path) -> None:
    results = Results(tmp_path / "measurements.json", {})
    results["mlp", "plain", "memory"] = {"peak": 1000, "resident": 5, "parameters": 100}
    results["mlp", "ours-every", "check"] = {"gradient_error": 0.0, "statistic_error": 0.25}
    results["mlp", "ours-every", "memory"] = {"peak": 1150, "resident": 7, "parameters": 100}
    results["mlp", "ours-every", "time0"] = {"plain": [8.0, 8.0], "seconds": [8.0, 16.0], "cycle": 8}
    results["mlp", "ours-every", "time1"] = {"plain": [8.0], "seconds": [24.0], "cycle": 8}
    results["mlp", "loop", "time0"] = {"plain": [1.0], "seconds": [99.0], "cycle": 1}
    found = row(results, "mlp", "ours-every")
    assert (found.lower, found.ratio, found.upper) == (1.5, 2.0, 2.5)
    assert (found.plain_ms, found.ms) == (1000, 2000)  # of a step, not of a cycle
    assert (found.pairs, found.processes, found.peak, found.resident) == (3, 2, 1150, 7)
    assert found.above == 1.5 and found.statistic_error == 0.25 and found.error is None


def test_measurements_of_other_code_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "measurements.json"
    Results(path, {"code": "a"})["mlp", "loop", "check"] = {"error": "wrong"}
    assert Results(path, {"code": "a"}).error("mlp", "loop") == "wrong"
    other = Results(path, {"code": "b"})
    assert other.error("mlp", "loop") is None and other.dropped == 1


def test_code_is_that_of_what_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """C++ of the library too, and the benchmark's modules, but no optimizer, and not how results are told."""
    library, experiments = tmp_path / "gradstats", tmp_path / "experiments"
    measuring, idle = [library / "a.py", library / "b.cpp"], [library / "optim" / "adam.py", library / "c.so"]
    measuring += [experiments / name for name in module.MEASURING]
    idle += [experiments / "benchmarks" / "report.py"]
    for path in [*measuring, *idle]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    monkeypatch.setattr(module.gradstats, "__file__", str(library / "__init__.py"))
    monkeypatch.setattr(module, "__file__", str(experiments / "benchmarks" / "results.py"))
    found = {code()}
    for path in measuring:
        path.write_text("1")
        assert code() not in found
        found.add(code())
    for path in idle:
        path.write_text("1")
        assert code() in found


IMPORTED = """
import sys
import experiments.benchmarks.measure
print(*(module.__file__ for name, module in sys.modules.items() if name.partition(".")[0] == "experiments"))
"""


def test_what_measures_is_what_a_measuring_process_imports() -> None:
    """Beside packages' own files."""
    experiments = Path(module.__file__).parents[1]
    command = [sys.executable, "-c", IMPORTED]
    told = subprocess.run(command, capture_output=True, text=True, check=True, cwd=experiments.parent).stdout
    imported = {str(Path(path).relative_to(experiments)) for path in told.split() if not path.endswith("__init__.py")}
    assert imported == set(module.MEASURING)
