"""Nothing is lost and nothing is mixed when a run ends before its time."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
import torch

from experiments import checkpoint, record, resume
from experiments.errors import UserError
from experiments.record import Record
from experiments.schemas.run import Config
from experiments.train import train
from tests.experiments.runs import METHODS, numbers, parameters

Compose = Callable[..., Config]


class Killed(BaseException):
    """Stands for kill -9 at a known moment."""


def train_until(examples: int, config: Config, directory: Path) -> None:
    def kill(seen: int, total: int, loss: float) -> None:
        if seen >= examples:
            raise Killed

    with pytest.raises(Killed):
        train(config, directory, kill)


@pytest.mark.parametrize("method", METHODS)
def test_continues_bit_for_bit(method: str, short: Compose, tmp_path: Path) -> None:
    config = short(f"optimizer={method}", "resume=true", "train.checkpoint_every_examples=512", "train.max_norm=1")
    whole = train(config, tmp_path / "whole")
    for examples in (600, 1600):  # twice, and not where a checkpoint is
        train_until(examples, config, tmp_path / "killed")
    assert numbers(train(config, tmp_path / "killed")) == numbers(whole)
    assert torch.equal(parameters(tmp_path / "killed"), parameters(tmp_path / "whole"))


@pytest.mark.parametrize("part", [["engine.every=4"], ["engine.fraction=0.25"]])
def test_statistics_of_a_part_continue_bit_for_bit(part: list[str], short: Compose, tmp_path: Path) -> None:
    """At R = 1, where the statistics of every batch are read."""
    options = ["optimizer=batch_invariant_adam_r1", "resume=true", "train.checkpoint_every_examples=512"]
    config = short(*options, *part)
    whole = train(config, tmp_path / "whole")
    assert numbers(whole) != numbers(train(short(*options), tmp_path / "all"))
    train_until(1600, config, tmp_path / "killed")
    assert numbers(train(config, tmp_path / "killed")) == numbers(whole)
    assert torch.equal(parameters(tmp_path / "killed"), parameters(tmp_path / "whole"))


def test_processor_time_adds_up(short: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that is read at the beginning, and at every stop."""
    config = short("optimizer=adam", "resume=true", "train.checkpoint_every_examples=512")
    ticks = count()
    monkeypatch.setattr(time, "process_time", lambda: float(next(ticks)))
    whole = train(config, tmp_path / "whole")
    train_until(1600, config, tmp_path / "killed")
    assert train(config, tmp_path / "killed").processor_seconds == whole.processor_seconds
    assert whole.processor_seconds is not None and whole.processor_seconds >= len(whole.examples) > 1


def test_processor_time_of_a_part_is_not_that_of_the_run(
    short: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = short("optimizer=adam", "resume=true", "train.checkpoint_every_examples=512")
    with monkeypatch.context() as before:
        before.setattr(resume, "Record", lambda *given, **_: Record(*given))  # from when it was not counted
        train_until(1600, config, tmp_path)
    ended = train(config, tmp_path)
    assert ended.status == "finished" and ended.processor_seconds is None and ended.seconds > 0


def test_a_directory_with_a_run_is_neither_overwritten_nor_mixed(short: Compose, tmp_path: Path) -> None:
    train_until(2560, short("optimizer=adam", "train.checkpoint_every_examples=1024"), tmp_path)
    with pytest.raises(UserError, match=f"{tmp_path} holds a run already: add resume=true"):
        train(short("optimizer=adam"), tmp_path)
    other = short("optimizer=adam", "train.checkpoint_every_examples=1024", "optimizer.lr=0.5", "resume=true")
    with pytest.raises(UserError, match="another configuration: optimizer.lr was 0.008 and is now 0.5"):
        train(other, tmp_path)


def test_a_finished_run_is_returned_as_it_is(short: Compose, tmp_path: Path) -> None:
    first = train(short("optimizer=adam"), tmp_path)
    assert train(short("optimizer=adam", "resume=true"), tmp_path) == first
    with pytest.raises(UserError, match="train.batch_size was 16 and is now 64"):
        train(short("optimizer=adam", "resume=true", "train.batch_size=64"), tmp_path)


def test_a_damaged_checkpoint_is_left_alone_and_the_one_before_continues(short: Compose, tmp_path: Path) -> None:
    config = short("optimizer=adam", "resume=true", "train.checkpoint_every_examples=512")
    whole = train(config, tmp_path / "whole")
    directory = tmp_path / "killed"
    train_until(1600, config, directory)
    path, previous = directory / checkpoint.FILE, directory / checkpoint.PREVIOUS
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=f"{path} is damaged .* move {previous} to {path}"):
        train(config, directory)
    assert path.stat().st_size == 1000
    previous.rename(path)
    assert numbers(train(config, directory)) == numbers(whole)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["adam", "batch_invariant_adam"])
def test_resumes_bit_for_bit_after_kill_9(method: str, tmp_path: Path) -> None:
    overrides = [f"optimizer={method}", "train.batch_size=4", "train.checkpoint_every_examples=256", "resume=true"]

    def start(name: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "experiments.train", *overrides, f"directory={tmp_path / name}"],
            stdout=subprocess.DEVNULL,
        )

    assert start("whole").wait() == 0
    directory = tmp_path / "killed"
    for _ in range(3):
        process = start("killed")
        path, before = directory / checkpoint.FILE, modified(directory)
        while modified(directory) == before and process.poll() is None:
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (directory / record.FILE).exists(), "the run ended before it could be killed"
    kept = checkpoint.load(path, torch.device("cpu"))
    assert start("killed").wait() == 0
    assert numbers(Record.load(directory / record.FILE)) == numbers(Record.load(tmp_path / "whole" / record.FILE))
    assert torch.equal(parameters(directory), parameters(tmp_path / "whole"))
    started = [run.name.rpartition("-")[2] for run in directory.glob("wandb/offline-run-*")]
    assert len(started) == 4 and set(started) == {kept["run_id"]}


def modified(directory: Path) -> int:
    path = directory / checkpoint.FILE
    return path.stat().st_mtime_ns if path.exists() else 0
