"""What experiments.faults would find wrong; and, slow, that it finds nothing wrong in a run that is killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import witness
from experiments.errors import UserError
from experiments.faults import Run, disturbed_run, trajectory
from experiments.witness import Attempt, witnessed

ROOT = Path(__file__).resolve().parents[2]


def write(folder: Path, attempt: int, rank: int, text: str) -> None:
    folder.mkdir(exist_ok=True)
    witness.path(folder, attempt, rank).write_text(text)


def test_a_witness_has_no_line_that_was_cut_off(tmp_path: Path) -> None:
    assert witnessed(tmp_path, 0, 1) == Attempt(0)
    for text, expected in {
        "12": Attempt(0),
        "12\n": Attempt(12),
        "12\n2 5 6\n4 7": Attempt(12, {2: [5, 6]}),
        "12\n2 5 6\n4 7 8\n": Attempt(12, {2: [5, 6], 4: [7, 8]}),
    }.items():
        write(tmp_path, 0, 1, text)
        assert witnessed(tmp_path, 0, 1) == expected


# By attempt, by process; each step has one example for a process, of 10, 11, ...
TWO = ["1\n2 10\n4 12\n6 14\n", "2\n2 11\n4 13\n"]  # killed when one of them was in the third step


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        (["3\n4 12\n6 14\n8 16\n", "4\n4 13\n6 15\n8 17\n"], {2: [10, 11], 4: [12, 13], 6: [14, 15], 8: [16, 17]}),
        (["3\n2 20\n4 22\n", "4\n2 21\n4 23\n"], {2: [20, 21], 4: [22, 23]}),
        (["3\n6 24\n", "4\n6 25\n"], {2: [10, 11], 4: [12, 13], 6: [24, 25]}),
    ],
    ids=["from a checkpoint", "from the beginning", "other examples"],
)
def test_a_trajectory_is_what_the_end_comes_from(
    second: list[str], expected: dict[int, list[int]], tmp_path: Path
) -> None:
    run = Run(tmp_path, 2)
    for attempt, texts in enumerate([TWO, second]):
        for rank, text in enumerate(texts):
            write(run.witnesses, attempt, rank, text)
    assert trajectory(run, 2) == expected


def test_a_gap_between_attempts_is_found(tmp_path: Path) -> None:
    run = Run(tmp_path, 2)
    for attempt, texts in enumerate([TWO, ["3\n8 16\n", "4\n8 17\n"]]):
        for rank, text in enumerate(texts):
            write(run.witnesses, attempt, rank, text)
    with pytest.raises(UserError, match="attempt 1 began at 6 examples"):
        trajectory(run, 2)


def test_a_run_is_as_long_as_its_kills_ask_for() -> None:
    assert [disturbed_run(kills)[-1] for kills in (1, 6, 20)] == [f"train.epochs={n}" for n in (24, 24, 80)]


def typed(output: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "experiments.faults", "--output", str(output), *arguments]


def faults(output: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = typed(output, *arguments)
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=540, env=os.environ)


@pytest.mark.slow
def test_runs_that_are_killed_end_as_one_that_is_not(tmp_path: Path) -> None:
    ended = faults(tmp_path, "--kills", "2", "optimizer=adam")
    assert ended.returncode == 0, ended.stderr
    found = json.loads((tmp_path / "faults.json").read_text())
    assert set(found["same"].values()) == {True} and len(found["same"]) == 4
    assert len(found["kills"]) == 2 and all(kill["resumed"] <= kill["seen"] for kill in found["kills"])


@pytest.mark.slow
def test_who_ends_it_leaves_no_process_behind(tmp_path: Path) -> None:
    with subprocess.Popen(typed(tmp_path), cwd=ROOT) as started:
        while not (process := witnessed(tmp_path / "undisturbed" / "witnesses", 0, 1).pid):
            assert started.poll() is None
            time.sleep(0.1)
        started.terminate()
    assert started.returncode == 143
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)
