"""W&B runs are read back by W&B's own reader, `wandb leet inspect`, without an account or a screen."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from experiments.config import compose_config
from experiments.record import Record
from experiments.schemas.run import Config
from experiments.tracker import Histogram, Picture, how_to_look, open_tracker, summarized


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


def test_the_summary_has_the_better_extreme_and_the_whole_record(tmp_path: Path) -> None:
    """The record's first half is of the run before it was resumed, whose minimum W&B has not seen."""
    result = Record(
        "adam", "Adam", 0.1, 16, 0, "f", "running", [0, 8, 16], [2.0, 0.25, 0.75], [2.5, 1, 1.5], [0, 0.5, 0.25]
    )
    with open_tracker(config(), tmp_path) as tracker, suppress(KeyError), summarized(tracker, result, lambda: 0.2):
        tracker.log(12, {"loss/train": 0.5, "accuracy/test": 0.375, "loss/batch": 0.125})
        tracker.log(16, {"loss/train": 0.75, "accuracy/test": 0.25, "loss/batch": 0.625})
        result.status, result.seconds = "diverged", 3.5
        raise KeyError
    (run,) = runs(tmp_path)
    summary = json.loads(inspect(run, "--summary"))["summary"]
    assert {name: value for name, value in summary.items() if not name.startswith("_")} == {
        "examples_seen": 16,
        "loss/train": {"min": 0.5, "last": 0.75},
        "accuracy/test": {"max": 0.375, "last": 0.25},
        "loss/batch": 0.625,
        "status": "diverged",
        "seconds": 3.5,
        "step_lr": 0.2,
        "examples": 16,
        "final/loss/train": 0.75,
        "final/loss/test": 1.5,
        "final/accuracy/test": 0.25,
        "best/loss/train": 0.25,
        "best/loss/test": 1,
        "best/accuracy/test": 0.5,
    }


def test_a_table_holds_its_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(
        "WANDB_DATA_DIR", str(tmp_path / "data")
    )  # where offline pictures of tables wait for `wandb sync`
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    with open_tracker(config(), tmp_path) as tracker:
        tracker.table("hardest", ["rank", "picture"], [[1, Picture(pixels)]])
    (run,) = runs(tmp_path)
    records = [json.loads(line) for line in inspect(run).splitlines()]
    (artifact,) = (record["artifact"] for record in records if record["type"] == "artifact")
    (image,) = (entry for entry in artifact["manifest"]["contents"] if entry["path"].endswith(".png"))
    assert np.array_equal(np.asarray(Image.open(image["local_path"])), pixels)


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


def test_a_service_that_is_killed_stops_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def log(directory: Path, kill: bool) -> None:
        directory.mkdir()
        with open_tracker(config(), directory) as tracker:
            if kill:
                services = [child for child in psutil.Process().children() if "wandb" in child.name()]
                assert services
                for service in services:
                    service.kill()
                    service.wait()
            for examples in range(100):
                tracker.log(examples, {"loss/batch": 1.5})
                time.sleep(0.001)

    log(tmp_path / "killed", kill=True)
    assert capsys.readouterr().err.startswith("W&B failed, and this run goes on without it: ")
    log(tmp_path / "next", kill=False)
    assert capsys.readouterr().err == ""
    assert json.loads(inspect(*runs(tmp_path / "next"), "--summary"))["state"] == "finished"


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
