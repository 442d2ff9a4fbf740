"""What is measured, in which order, once."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.benchmarks import run as module
from experiments.benchmarks.contestants import CONTESTANTS
from experiments.benchmarks.results import Results, row
from experiments.benchmarks.run import Plan, run
from experiments.benchmarks.workloads import SCALES, WORKLOADS, Settings

SLOW, FAST = ({"plain": [1.0, 1.0], "seconds": [own, own], "cycle": 1} for own in (9.0, 1.5))


def plan(settings: Settings, **changes) -> Plan:
    defaults = {"workloads": ["mlp"], "scales": [], "contestants": ["plain", "loop"], "named": False}
    defaults |= {"steps": 2, "seconds": 0.0, "processes": 2, "limit": 60}
    return Plan(settings=settings, **(defaults | changes))


def test_processes_of_a_contestant_are_apart(settings: Settings) -> None:
    keys = [" ".join(key) for key in plan(settings).jobs()]
    assert keys == [
        *("mlp plain check", "mlp plain memory", "mlp loop check", "mlp loop memory"),
        *("mlp plain time0", "mlp loop time0", "mlp plain time1", "mlp loop time1"),
    ]


def test_scales_have_a_process_for_each_value(settings: Settings) -> None:
    keys = list(plan(settings, workloads=[], scales=["scale_batch"]).jobs())
    assert [workload for workload, *_ in keys[::2]] == [f"scale_batch={b}" for b in SCALES["scale_batch"].quick]


def test_contestants_take_part_where_they_belong_or_are_named(settings: Settings) -> None:
    everyone = {"contestants": list(CONTESTANTS), "workloads": list(WORKLOADS)}
    taken = {key[:2] for key in plan(settings, **everyone).jobs()}
    assert {workload for workload, contestant in taken if contestant == "ours-compiled"} == {"mlp", "resnet18", "gpt"}
    assert {contestant for workload, contestant in taken if workload == "gpt2_layers"} == {
        "plain",
        "ours-second_moment",
    }
    assert {contestant for workload, contestant in taken if workload == "mlp"} == set(CONTESTANTS)
    named = {key[:2] for key in plan(settings, named=True, **everyone).jobs()}
    assert len(named) == len(WORKLOADS) * len(CONTESTANTS)


def test_what_takes_part_somewhere_only_names_what_there_is() -> None:
    assert {name for one in CONTESTANTS.values() for name in one.only} <= set(WORKLOADS)
    assert {name for one in WORKLOADS.values() for name in one.only} <= set(CONTESTANTS)


def test_a_killed_run_continues(
    settings: Settings, tmp_path: Path, here: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "new" / "measurements.json"
    original = module.Plan.measure

    def killed(self, key):
        if key == ("mlp", "loop", "time0"):
            raise KeyboardInterrupt
        return FAST if key[2] == "time0" else original(self, key)

    monkeypatch.setattr(module.Plan, "measure", killed)
    with pytest.raises(KeyboardInterrupt):
        run(plan(settings), Results(path, {"torch": 1}))
    before = len(here)
    monkeypatch.undo()
    monkeypatch.setattr(module.Plan, "measure", lambda self, key: FAST)
    results = Results(path, {"torch": 1})
    kept = dict(results.measured)
    assert len(kept) == before + 1 == 5
    run(plan(settings), results)
    assert set(results.measured) - set(kept) == {"mlp loop time0", "mlp plain time1", "mlp loop time1"}
    assert all(results.measured[key] == value for key, value in kept.items())


@pytest.mark.parametrize(
    ("first", "expected"),
    [
        ({"error": "wrong: 3% off"}, ["check"]),
        (SLOW, ["check", "memory", "time0"]),
        (FAST, ["check", "memory", "time0", "time1"]),
    ],
)
def test_what_fails_or_is_slow_is_not_measured_further(
    first: dict, expected: list[str], settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = {"check": {"statistic_error": 0.0, "gradient_error": 0.0}, "memory": {"peak": 1, "parameters": 1}}
    answers |= {"check": first} if "error" in first else {"time0": first, "time1": first}
    answers["memory"]["resident"] = 1
    monkeypatch.setattr(module.Plan, "measure", lambda self, key: answers[key[2]])
    results = Results(tmp_path / "measurements.json", {})
    run(plan(settings, contestants=["loop"]), results)
    assert [key.split()[2] for key in results.measured] == expected
    assert row(results, "mlp", "loop").error == first.get("error")
