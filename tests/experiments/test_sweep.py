"""An interrupted sweep continues: what is finished is recognised, and the rest is done."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import checkpoint, record
from experiments import train as train_module
from experiments.data import Dataset, load_data
from experiments.record import Record
from tests.experiments.conftest import SHORT
from tests.experiments.runs import numbers


class Killed(BaseException):
    """Stands for kill -9 at a known moment."""


def test_finished_runs_are_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begun: list[int] = []

    def counted(*arguments: object) -> Dataset:
        begun.append(len(begun))
        if begun == [0, 1]:
            raise Killed
        return load_data(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(train_module, "load_data", counted)
    sweep = ["-m", *SHORT, "train.epochs=0.5", "optimizer=adam", "seed=0,1,2", f"directory={tmp_path}", "resume=true"]
    monkeypatch.setattr(sys, "argv", ["experiments.train", *sweep])
    with pytest.raises(Killed):
        train_module.main()
    first = (tmp_path / "0" / record.FILE).read_bytes()
    assert not (tmp_path / "1" / record.FILE).exists()

    train_module.main()
    assert len(begun) == 2 + 2  # the second, again, and the third
    assert (tmp_path / "0" / record.FILE).read_bytes() == first
    assert f"{tmp_path / '0'} holds this run, finished" in capsys.readouterr().err
    assert [Record.load(tmp_path / job / record.FILE).seed for job in "012"] == [0, 1, 2]


@pytest.mark.slow
def test_a_sweep_continues_after_kill_9(tmp_path: Path) -> None:
    options = [
        "tracker=none",
        "train.batch_size=4",
        "train.epochs=6",
        "train.checkpoint_every_examples=256",
        "optimizer=adam",
    ]

    def start(directory: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "experiments.train", "-m", *options, "seed=0,1", "resume=true"]
        return subprocess.Popen([*command, f"directory={directory}"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    (process := start(whole)).communicate()
    assert process.returncode == 0
    process = start(killed)
    while not (killed / "1" / checkpoint.FILE).exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (killed / "1" / record.FILE).exists(), "the sweep ended before it could be killed"
    _, err = (process := start(killed)).communicate()
    assert process.returncode == 0 and f"{killed / '0'} holds this run, finished".encode() in err
    for job in "01":
        ended, expected = (Record.load(directory / job / record.FILE) for directory in (killed, whole))
        assert numbers(ended) == numbers(expected)
