"""W&B runs are read back by W&B's own reader, `wandb leet inspect`, without an account or a screen."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments.config import Config, compose_config
from experiments.tracker import Histogram, how_to_look, open_tracker


def inspect(run: Path, *options: str) -> str:
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", *options, str(run)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def runs(directory: Path) -> list[Path]:
    return sorted(directory.glob("wandb/offline-run-*"))


def config(*overrides: str) -> Config:
    return compose_config(["tracker=wandb", "name=tracked", *overrides])


def history(run: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in inspect(run).splitlines()]
    return [record["history"]["item"] for record in records if record["type"] == "history"]


def test_a_tracked_run_can_be_read_back(tmp_path: Path) -> None:
    cfg = config("tracker.group=sweep", "tracker.tags=[a,b]", "tracker.job_type=tune")
    with open_tracker(cfg, tmp_path) as tracker:
        tracker.log(256, {"loss/batch": 1.5, "worst_layer/name": "3"})
        tracker.log(512, {"loss/batch": 0.5, "norms/3": Histogram([1.0, 2.0], [0.0, 0.5, 1.0])})
        tracker.table("scores", ["method", "score"], [["ours", 0.01]])
    (run,) = runs(tmp_path)
    summary = json.loads(inspect(run, "--summary"))
    assert (summary["run_id"], summary["state"], summary["exit_code"]) == (tracker.run_id, "finished", 0)
    assert (summary["name"], summary["tags"], summary["project"]) == ("tracked", ["a", "b"], "gradstats")
    assert summary["config"]["optimizer"]["name"] == cfg.optimizer.name

    first, second, *_ = history(run)
    assert (first["examples_seen"], first["loss/batch"], first["worst_layer/name"]) == (256, 1.5, "3")
    assert (second["norms/3._type"], second["norms/3.values"], second["norms/3.bins"]) == (
        "histogram",
        [1, 2],
        [0, 0.5, 1],
    )
    assert summary["summary"]["scores"]["_type"] == "table-file" and summary["summary"]["scores"]["nrows"] == 1
    records = [json.loads(line) for line in inspect(run).splitlines()]
    metrics = [record["metric"] for record in records if record["type"] == "metric"]
    assert {"glob_name": "*", "step_metric": "examples_seen"}.items() <= metrics[1].items()


def test_a_run_that_raises_is_marked_and_can_be_continued(tmp_path: Path) -> None:
    with pytest.raises(KeyError), open_tracker(config(), tmp_path / "first") as tracker:
        raise KeyError
    (run,) = runs(tmp_path / "first")
    assert json.loads(inspect(run, "--summary"))["exit_code"] == 1
    with open_tracker(config(), tmp_path / "second", tracker.run_id) as continued:
        continued.log(1024, {"loss/batch": 0.25})
    (run,) = runs(tmp_path / "second")
    assert json.loads(inspect(run, "--summary"))["run_id"] == tracker.run_id


def test_a_failure_of_wandb_is_told_once_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import wandb

    def fail(**settings: object) -> None:
        raise OSError("disk is full")

    monkeypatch.setattr(wandb, "init", fail)
    with open_tracker(config(), tmp_path) as tracker:
        tracker.log(256, {"loss/batch": 1.5})
        tracker.image("figure", tmp_path / "figure.png")
    assert tracker.run_id is None
    assert capsys.readouterr().err == "W&B failed, and this run goes on without it: disk is full\n"


def test_no_tracker_does_not_import_wandb(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path\n"
        "from experiments.config import compose_config\n"
        "from experiments.train import train\n"
        "short = ['tracker=none', 'optimizer=adam', 'train.epochs=1', 'train.warmup_examples=0']\n"
        f"train(compose_config(short), Path({str(tmp_path)!r}))\n"
        "assert 'wandb' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    assert how_to_look(tmp_path) is None


def test_an_online_run_without_an_account_is_tracked_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with open_tracker(config("tracker.mode=online"), tmp_path) as tracker:
        tracker.log(256, {"loss/batch": 1.5})
    assert "W&B failed, and this run is tracked offline: " in capsys.readouterr().err
    (run,) = runs(tmp_path)
    assert history(run)[0]["loss/batch"] == 1.5


def test_the_hint_is_what_to_type(tmp_path: Path) -> None:
    (tmp_path / "wandb").mkdir()
    assert how_to_look(tmp_path) == f"charts in the terminal: wandb leet {tmp_path}/wandb"
    (tmp_path / "wandb" / "offline-run-x").mkdir()
    hint = how_to_look(tmp_path)
    assert hint is not None and hint.endswith(f"wandb sync {tmp_path}/wandb/offline-run-*")
