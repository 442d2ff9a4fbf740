"""A run in words."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from experiments import benchmark
from experiments.benchmarks.report import Run, page, summary
from experiments.benchmarks.results import Results
from tests.experiments.benchmarks.synthetic import ABOUT, made, run


def test_page_has_a_line_for_every_contestant_ours_first() -> None:
    lines = page(run()).splitlines()
    assert "Measured on 2026-01-01: device cpu, dtype float32, threads 2, processor abacus, torch 2" in lines[0]
    assert "**MLP 784-1024-1024-10.** B = 256, width = 1,024." in lines
    table = [line for line in lines if line.startswith("| ")]
    assert table[1:5] == [
        "| **gradstats** | second moment | 1.50 | 1.40 to 1.60 | 20 | 15 | +1.04 | 2e-07 |",
        "| **gradstats** | norms | 1.12 | 1.02 to 1.23 | 20 | 11.2 | +0.00 | 2e-07 |",
        "| **gradstats** | all | 1.60 | 1.50 to 1.70 | 20 | 16 | +1.04 | 2e-07 |",
        "| **gradstats, 8 micro-batches** | second moment | 1.01 | 0.91 to 1.11 | 20 | 10.1 | +1.04 | est. |",
    ]
    assert "| plain torch, against itself | – | 1.00 | 0.90 to 1.10 | 20 | 10 | +0.00 | – |" in table
    assert "| BackPACK, SumGradSquared | second moment | wrong: 3.0% off | – | – | – | – | – |" in table
    assert "| Opacus, ghost clipping | norms | not installed | – | – | – | – | – |" in table
    assert "| Opacus, hooks | second moment | 120 | 120 to 120 | 20 | 1.2e+03 | +1.04 | 2e-07 |" in table
    assert "| B: MLP | norms | 1 | 4 | 2.00, 4.00 | 0.50 | 1.00 |" in table


def test_page_ends_with_the_bars() -> None:
    before, _, bars = page(run()).rpartition("**Bars.** ")
    assert "| B: MLP |" in before
    mlp = "| MLP 784-1024-1024-10 | gradstats | second moment |"
    lacking = "not measured: asks for device cuda, dtype bfloat16, processor H200"
    for line in (
        f"{mlp} time | 1.50 | 1.50 | 1.40 to 1.60 | cannot be judged |",
        f"{mlp} memory | 1.00 | 1.04 | – | does not hold |",
        f"{mlp} time | below 9.50 (torch.func, all at once) | 1.50 | 1.40 to 1.60 | holds |",
        f"| GPT-2 small | gradstats | second moment | time | 1.15 | – | – | {lacking} |",
    ):
        assert line in bars.splitlines()
    assert "Bars" not in page(run(quick=True))  # of other shapes


def test_summary_names_the_best_of_those_that_are_right() -> None:
    """Neither the wrong one, nor an estimate, nor one of ours."""
    lines = summary(run()).splitlines()
    row = "| MLP 784-1024-1024-10 | 1.50 | – | 1.12 | 1.60 | +1.04 | 9.50 (torch.func, all at once) | – |"
    assert lines[2] == row and "abacus" in lines[-1]
    assert len({line.count("|") for line in lines[:3]}) == 1


def test_summary_has_what_sampled_steps_cost() -> None:
    sampled = replace(run(), rows=[made("ours-second_moment", 1.5), made("ours-every", 1.07)])
    header, _, line, *_ = summary(sampled).splitlines()
    assert header.startswith("| workload | second moment | every 8th step | norms |")
    assert line.startswith("| MLP 784-1024-1024-10 | 1.50 | 1.07 | – |")


def test_summary_shows_the_command_that_makes_it() -> None:
    """To who reads, not in a comment; and it is one of the benchmark's."""
    (command,) = re.findall("`(.*?)`", summary(run()))
    python, m, module, *arguments = command.split()
    assert (python, m, module) == ("python", "-m", benchmark.__name__)
    assert benchmark.parser().parse_args(arguments).record is True


def test_quick_runs_name_their_own_shapes_and_say_what_they_are_not() -> None:
    assert "B = 8, width = 16. Two pairs of steps" in page(run(quick=True))
    assert "tell no prices" not in page(run())


def test_runs_come_back_from_json_even_with_columns_of_other_versions() -> None:
    written = json.loads(json.dumps(run().to_json()))
    written["rows"][0]["colour"] = "blue"
    del written["rows"][1]["resident"]
    assert Run.from_json(written) == run()


def test_a_run_has_the_rows_that_were_measured(tmp_path) -> None:
    results = Results(tmp_path / "measurements.json", ABOUT)
    results["gpt", "loop", "check"] = {"error": "takes more than 9 s"}
    results["mlp", "loop", "check"] = {"gradient_error": 0.0, "statistic_error": 0.0}
    for value, own in ((1, 1.0), (4, 8.0), (16, 64.0)):
        results[f"scale_batch={value}", "ours-norms", "time0"] = {"plain": [1.0] * 2, "seconds": [own] * 2, "cycle": 1}
    results["scale_width=64", "ours-norms", "time0"] = {"plain": [1.0] * 2, "seconds": [1.0] * 2, "cycle": 1}
    results["scale_depth=2", "ours-norms", "time0"] = {"error": "crashed"}
    found = Run.of(results)
    assert [(r.workload, r.contestant, r.error) for r in found.rows] == [
        ("mlp", "loop", None),
        ("gpt", "loop", "takes more than 9 s"),
    ]
    (growth,) = found.growths  # one point has no slope
    assert (growth.scale, growth.values, growth.ratio) == ("scale_batch", [1, 4, 16], [1.0, 8.0, 64.0])
    assert growth.slope == pytest.approx(1.5) and growth.plain_slope == pytest.approx(0)
