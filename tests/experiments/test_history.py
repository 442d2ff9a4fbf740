"""What a run logs lies beside its record, and a run that was killed has each of its lines once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import checkpoint, history
from experiments.errors import UserError
from experiments.fingerprint import as_dict
from experiments.history import History
from experiments.schemas.run import Config
from experiments.tracker import Histogram
from experiments.train import train
from tests.experiments.test_resume import train_until

Compose = Callable[..., Config]

CPU = torch.device("cpu")


def repeatable(directory: Path) -> list[dict[str, Any]]:
    """Without what depends on the clock."""
    return [
        {key: value for key, value in line.items() if not key.startswith("speed/")} for line in history.load(directory)
    ]


def test_a_run_keeps_its_configuration_its_machine_and_its_scalars(short: Compose, tmp_path: Path) -> None:
    config = short("optimizer=batch_invariant_adam", "train.log_every_examples=512", "tracker.detail=true")
    result = train(config, tmp_path)
    assert json.loads((tmp_path / history.CONFIG).read_text()) == as_dict(config)
    assert json.loads((tmp_path / history.MACHINE).read_text())["torch"] == torch.__version__
    lines = history.load(tmp_path)
    assert [line["examples_seen"] for line in lines] == sorted({0, 256, 768, 2816, *range(512, 2816, 512)})
    assert lines[-1]["loss/train"] == pytest.approx(result.train_loss[-1], rel=1e-5)
    assert {"gradient/noise_scale", "worst_layer/name", "layers/1/signal_to_noise", "optimizer/lr"} <= set(lines[-1])
    assert not any(name.startswith("norms/") for line in lines for name in line)


@pytest.mark.parametrize("stops", [(600, 1600), (300,)])  # the checkpoints are at 512, 1024, ...
def test_nothing_is_lost_or_repeated_in_a_run_that_was_killed(
    stops: tuple[int, ...], short: Compose, tmp_path: Path
) -> None:
    options = ["train.checkpoint_every_examples=512", "train.log_every_examples=64", "resume=true"]
    config = short("optimizer=adam", *options)
    train(config, tmp_path / "whole")
    for examples in stops:
        train_until(examples, config, tmp_path / "killed")
        with (tmp_path / "killed" / history.FILE).open("a") as file:
            file.write('{"examples_seen":')  # as a kill within a write leaves it
    train(config, tmp_path / "killed")
    assert repeatable(tmp_path / "killed") == repeatable(tmp_path / "whole")


def test_a_checkpoint_finds_the_history_on_the_disk_up_to_it(
    short: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a power cut could leave a checkpoint whose past is gone."""
    order: list[str] = []
    save, flush = checkpoint.save, History.flush
    monkeypatch.setattr(checkpoint, "save", lambda *rest: order.append("checkpoint") or save(*rest))
    monkeypatch.setattr(History, "flush", lambda self: order.append("history") or flush(self))
    train(short("optimizer=adam", "train.checkpoint_every_examples=1024"), tmp_path)
    assert order == ["history", "checkpoint"] * 3


def test_lines_are_short_and_histograms_are_left_out(short: Compose, tmp_path: Path) -> None:
    values = {"loss": 1 / 3, "name": "fc1", "large": 123456789.0, "norms": Histogram([1.0], [0.0, 1.0])}
    with History(short(), tmp_path, CPU, 0) as kept:
        kept.log(256, values)
        # Readable while the run goes on.
        assert (tmp_path / history.FILE).read_text() == (
            '{"examples_seen":256,"loss":0.333333,"name":"fc1","large":123457000.0}\n'
        )


def test_a_run_that_begins_anew_forgets_what_was_there(short: Compose, tmp_path: Path) -> None:
    for position, left in ((0, []), (256, [0, 256]), (128, [0])):
        with History(short(), tmp_path, CPU, 0) as kept:
            kept.log(0, {"loss": 2.0})
            kept.log(256, {"loss": 1.0})
        with History(short(), tmp_path, CPU, position):
            pass
        assert [line["examples_seen"] for line in history.load(tmp_path)] == left


def test_what_is_no_history_is_named(tmp_path: Path) -> None:
    assert history.load(tmp_path) == []
    path = tmp_path / history.FILE
    path.write_text("{}\n}\n")
    with pytest.raises(UserError, match=f"{path} is not the history of a run .* delete it"):
        history.load(tmp_path)
