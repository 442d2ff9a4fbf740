"""Jobs: where they are kept, what of them is loaded again, and that each runs once."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console

from experiments.config import compose_config
from experiments.errors import UserError
from experiments.fingerprint import identity
from experiments.jobs import FILE, Measurement, load, measurement, run_jobs, training
from experiments.progress import silent
from experiments.schemas.run import Config

Make = Callable[..., Config]


def threads(x: int) -> dict[str, int]:
    return {"x": x, "threads": torch.get_num_threads()}


def other(x: int) -> int:
    return -x


def test_a_measurement_is_found_by_its_function_and_arguments(tmp_path: Path) -> None:
    jobs = [measurement(tmp_path, threads, x=1), measurement(tmp_path, threads, x=2), measurement(tmp_path, other, x=1)]
    assert len({job.directory for job in jobs}) == 3
    assert measurement(tmp_path, threads, cost=9.0, x=1).directory == jobs[0].directory
    assert not jobs[0].is_finished()
    jobs[0].run(silent)
    assert jobs[0].is_finished() and not jobs[1].is_finished()
    result = load(jobs[0].directory, jobs[0].coordinates)
    assert result.coordinates == {"x": 1} and result.found == {"x": 1, "threads": 1} and result.seconds >= 0


def waits(x: int) -> int:
    time.sleep(0.2)
    return x


def test_waiting_for_a_busy_machine_is_no_computing(tmp_path: Path) -> None:
    job = measurement(tmp_path, waits, x=1)
    job.run(silent)
    result = load(job.directory, job.coordinates)
    assert result.processor_seconds is not None and 0 <= result.processor_seconds < 0.2 <= result.seconds
    assert result.core_seconds == result.processor_seconds


def test_results_from_before_processor_time_was_counted_have_wall_clock_time(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text('{"found": 1, "seconds": 2.5}')
    assert load(tmp_path, {"x": 1}).core_seconds == 2.5


def test_equal_configurations_share_a_run_and_unequal_ones_do_not(short: Make, tmp_path: Path) -> None:
    base = short()
    one = training(tmp_path, base)
    assert (
        one.directory == training(tmp_path, dataclasses.replace(base, name="another", directory="elsewhere")).directory
    )
    assert one.directory != training(tmp_path, short("train.decay=linear")).directory
    assert one.directory != training(tmp_path, short("seed=1")).directory


def test_a_training_job_trains_once_and_loads_its_record(short: Make, tmp_path: Path) -> None:
    job = training(tmp_path, short("train.epochs=0.5"), method="mine")
    told: list[int] = []
    job.run(lambda examples, total, loss: told.append(examples))
    result = load(job.directory, job.coordinates)
    assert job.is_finished() and told[-1] == result.found.examples[-1]
    assert result.coordinates == {"method": "mine"} and result.seconds == result.found.seconds > 0
    assert result.core_seconds == result.found.processor_seconds > 0


def test_all_jobs_run_and_none_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jobs = [measurement(tmp_path, other, x=x) for x in (1, 2, 2)]
    run_jobs(jobs, 1, Console())
    assert "2 jobs, 0 of them finished before" in capsys.readouterr().out
    assert [load(job.directory, job.coordinates).found for job in jobs] == [-1, -2, -2]
    run_jobs([*jobs, measurement(tmp_path, other, x=3)], 1, Console())
    assert "3 jobs, 2 of them finished before" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["{", json.dumps({"found": 1}), json.dumps([1])])
def test_a_damaged_measurement_is_a_user_error(text: str, tmp_path: Path) -> None:
    job: Measurement = measurement(tmp_path, other, x=1)
    job.directory.mkdir()
    (job.directory / FILE).write_text(text)
    with pytest.raises(UserError, match=r"measurement.json is damaged .* delete it to measure again"):
        load(job.directory, job.coordinates)


def test_a_missing_result_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a record of a run"):
        load(tmp_path, {})


def test_an_option_that_came_later_leaves_runs_what_they_are(tmp_path: Path) -> None:
    base = compose_config(["directory=unknown"])
    assert base.engine.every == 1
    later = dataclasses.replace(base, engine=dataclasses.replace(base.engine, every=2))
    assert training(tmp_path, later).directory != training(tmp_path, base).directory
    assert identity(base)["engine"] == {"name": "fused"}
    assert identity(later)["engine"] == {"name": "fused", "every": 2}
