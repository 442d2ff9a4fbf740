from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from experiments.estimate import widening
from experiments.pages.groups import label, shown, states
from tests.experiments.pages.synthetic import collected, loss, write_run, write_sweep


def test_groups_differ_in_more_than_the_seed(tmp_path: Path) -> None:
    found = collected(write_sweep(tmp_path))
    assert len(found.groups) == 18 and all([run.seed for run in group.runs] == [0, 1, 2] for group in found.groups)
    assert found.telling == ("optimizer.label", "train.batch_size", "optimizer.lr")
    # The name of an optimizer says what its label has said.
    assert found.differing == (*found.telling, "optimizer.name")
    assert found.common() == {"optimizer.batch_size": 16, "train.epochs": 24}
    assert [group.label for group in found.groups[:2]] == [
        "Adam, <fixed> · B = 4 · lr = 0.005",
        "Adam, <fixed> · B = 4 · lr = 0.01",
    ]
    assert [group.settings["train.batch_size"] for group in found.groups[:9]] == [4] * 3 + [16] * 3 + [64] * 3


def test_what_decides_nothing_tells_no_groups_apart(tmp_path: Path) -> None:
    for i, name in enumerate("ab"):
        write_run(tmp_path / name, seed=i, tracker__tags=[name], name=name, resume=bool(i))
    found = collected(tmp_path)
    assert len(found.groups) == 1 and found.groups[0].label == "" and found.differing == found.telling == ()


def test_keys_that_a_group_lacks_tell_it_apart(tmp_path: Path) -> None:
    write_run(tmp_path / "a", optimizer__eps=1e-8)
    write_run(tmp_path / "b")
    assert [group.label for group in collected(tmp_path).groups] == ["eps = 1e-08", ""]


def test_of_equal_runs_the_one_that_got_furthest_counts(tmp_path: Path) -> None:
    write_run(tmp_path / "a", status="unfinished")
    whole = write_run(tmp_path / "b")
    write_run(tmp_path / "c", status="diverged")
    write_run(tmp_path / "d", seed=1, status="diverged")
    found = collected(tmp_path)
    (only,) = found.groups
    assert {run.seed: run.directory for run in only.runs} == {0: whole, 1: tmp_path / "d"}
    assert found.repeated == 2 and states(only.runs) == "1 finished, 1 diverged"


def test_final_values_with_their_interval(tmp_path: Path) -> None:
    for seed in range(3):
        write_run(tmp_path / str(seed), seed=seed, status="unfinished" if seed == 2 else "finished")
    (only,) = collected(tmp_path).groups
    values = [loss("adam", 0.01, 16, seed)[-1] for seed in (0, 1)]
    found = only.final("loss/train")
    assert found.value == only.mean("loss/train") == pytest.approx(np.mean(values))
    ends = np.mean(values) + widening(2) * (np.sort(values) - np.mean(values))
    assert (found.low, found.high) == pytest.approx(tuple(ends))
    assert only.final("accuracy/test").percent and math.isnan(only.final("nothing").value)


def test_labels() -> None:
    settings = {"optimizer.label": "ours", "train.batch_size": 16, "a.x": 0.5, "b.x": None, "b.y": [1, 2]}
    assert label(settings, ["optimizer.label", "train.batch_size", "a.x"]) == "ours · B = 16 · x = 0.5"
    assert label(settings, ["a.x", "b.x", "b.y", "b.z"]) == "a.x = 0.5 · b.x = none · y = [1, 2]"
    assert [shown(value) for value in (1e-8, True, "text", 3, None)] == ["1e-08", "true", "text", "3", "none"]
