import io
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress

from experiments.progress import note, progress_line, show


def test_time_left_weighs_runs_by_their_cost():
    progress = Progress()
    task = progress.add_task("", total=4.0)
    # The run of cost 3 is done after 30 seconds; the run of cost 1 has not begun.
    board = np.array([[512.0, 512.0, 0.25, 7.0], [0.0, 0.0, 0.0, 0.0]])
    show(board, ["slow", "fast"], np.array([3.0, 1.0]), before=2, elapsed=30.0, progress=progress, task=task)
    fields = progress.tasks[0].fields
    assert progress.tasks[0].completed == 3.0
    assert fields["runs"] == "3/4 runs"
    assert fields["latest"] == "loss 0.250 slow"
    assert fields["left"] == "0:10 left"


def test_nothing_is_claimed_before_the_first_note():
    progress = Progress()
    task = progress.add_task("", total=1.0)
    show(np.zeros((1, 4)), ["run"], np.ones(1), before=0, elapsed=5.0, progress=progress, task=task)
    assert progress.tasks[0].fields == {"runs": "0/1 runs", "latest": "", "left": ""}


def test_notes_reach_the_line_and_the_latest_is_shown():
    output = io.StringIO()
    with progress_line(["a", "b"], [1.0, 1.0], before=0, console=Console(file=output, width=100)) as board:
        note(board, 1, 256, 512, 0.75)
        time.sleep(0.01)
        note(board, 0, 512, 512, 0.5)
    assert "1/2 runs" in output.getvalue()
    assert "loss 0.500 a" in output.getvalue()


def test_a_measurement_shows_no_loss():
    progress = Progress()
    task = progress.add_task("", total=1.0)
    board = np.array([[1.0, 1.0, np.nan, 7.0]])
    show(board, ["variance=1"], np.ones(1), before=0, elapsed=5.0, progress=progress, task=task)
    assert progress.tasks[0].fields["latest"] == "variance=1"


def test_a_long_name_takes_no_room_from_the_counts():
    output = io.StringIO()
    with progress_line(["n" * 200], [2.0], before=0, console=Console(file=output, width=70)) as board:
        note(board, 0, 256, 512, 0.5)
    (line,) = output.getvalue().splitlines()
    assert "0/1 runs" in line
    assert "left loss 0.500 n" in line
    assert len(line) <= 70


def test_in_a_file_the_line_is_written_again(monkeypatch):
    output = io.StringIO()
    monkeypatch.setattr("experiments.progress.SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr("experiments.progress.SECONDS_BETWEEN_READS", 0.01)
    with progress_line(["a"], [1.0], before=0, console=Console(file=output, width=100)) as board:
        note(board, 0, 256, 512, 0.5)
        deadline = time.time() + 10
        while "loss" not in output.getvalue() and time.time() < deadline:
            time.sleep(0.01)
        assert "left loss 0.500 a\n" in output.getvalue()


def test_the_file_goes_with_the_line():
    with progress_line(["a"], [1.0], before=0, console=Console(file=io.StringIO())) as board:
        assert Path(board).exists()
    assert not Path(board).exists()
