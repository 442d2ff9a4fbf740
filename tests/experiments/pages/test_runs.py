from __future__ import annotations

import math
from pathlib import Path

import pytest

from experiments import history, record
from experiments.errors import UserError
from experiments.pages.runs import collect
from tests.experiments.pages.synthetic import EXAMPLES, MACHINE, loss, write_run, write_sweep


def test_runs_are_found_at_any_depth_and_each_once(tmp_path: Path) -> None:
    write_sweep(tmp_path / "study" / "runs", seeds=[0])
    write_run(tmp_path / "single")
    assert len(collect([tmp_path])) == 19
    assert len(collect([tmp_path, tmp_path / "single", tmp_path / "study" / ".." / "single"])) == 19
    # What a run's tools keep beside it is not looked through.
    (tmp_path / "single" / "wandb").mkdir()
    (tmp_path / "single" / "wandb" / record.FILE).touch()
    assert len(collect([tmp_path / "single"])) == 1


def test_what_a_run_holds(tmp_path: Path) -> None:
    (run,) = collect([write_run(tmp_path / "run", lr=0.02, seed=3)])
    assert (run.config["optimizer.lr"], run.seed, run.machine, run.status) == (0.02, 3, MACHINE, "finished")
    assert run.series["loss/train"] == dict(zip(EXAMPLES, loss("adam", 0.02, 16, 3), strict=True))  # not rounded
    assert run.series["gradient/noise_scale"] == {n: 10 + n / 64 for n in EXAMPLES[1:]}
    assert "worst_layer/name" not in run.series and "examples_seen" not in run.series
    assert run.reach == EXAMPLES[-1]


def test_a_run_from_before_there_was_a_history_has_what_its_record_says(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "run", batch_size=4)
    for name in (history.FILE, history.CONFIG, history.MACHINE):
        (directory / name).unlink()
    (run,) = collect([directory])
    assert (run.config["optimizer.label"], run.config["train.batch_size"], run.machine) == ("Adam, <fixed>", 4, {})
    assert set(run.series) == {"loss/train", "loss/test", "accuracy/test"}


def test_final_values_are_of_runs_that_have_ended(tmp_path: Path) -> None:
    """A run that diverged counts as its initial model, as studies have it."""
    finished, diverged, unfinished = (
        collect([write_run(tmp_path / status, status=status)])[0] for status in ("finished", "diverged", "unfinished")
    )
    curve = loss("adam", 0.01, 16, 0)
    assert finished.final("loss/train") == curve[-1]
    assert diverged.status == "diverged" and diverged.final("loss/train") == curve[0]
    assert unfinished.status == "unfinished" and math.isnan(unfinished.final("loss/train"))
    assert unfinished.series["loss/train"] and math.isnan(finished.final("no such"))


def test_a_run_that_has_logged_nothing_yet_is_a_run(tmp_path: Path) -> None:
    (tmp_path / history.FILE).touch()
    (run,) = collect([tmp_path])
    assert (run.status, run.series, run.reach) == ("unfinished", {}, 0)


def test_wrong_paths_are_named(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    for path, problem in ((tmp_path / "nowhere", "is no directory"), (tmp_path / "empty", "holds no runs")):
        with pytest.raises(UserError, match=f"{path} {problem}"):
            collect([tmp_path / "run", path])
    config = tmp_path / "run" / history.CONFIG
    config.write_text("{")
    with pytest.raises(UserError, match=f"{config} is damaged .* delete it"):
        collect([tmp_path])
