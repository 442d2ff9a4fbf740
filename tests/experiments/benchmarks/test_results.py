"""From measurements to rows."""

from __future__ import annotations

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


def test_code_is_that_of_all_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the library and of the benchmark: C++ too."""
    before = code()
    assert code() == before
    monkeypatch.setattr(module, "SOURCES", ("py",))
    (tmp_path / "gradstats").mkdir()
    source = tmp_path / "gradstats" / "a.py"
    monkeypatch.setattr(module.gradstats, "__file__", str(tmp_path / "gradstats" / "__init__.py"))
    found = set()
    for text in ("a = 1", "a = 2"):
        source.write_text(text)
        found.add(code())
    assert len(found | {before}) == 3
