"""The workspace as it would be sent, without network or account; its panels show what runs log."""

from __future__ import annotations

import json
import re
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from experiments.schemas.run import Config
from experiments.tracker import AXIS, WandbTracker
from experiments.train import train
from experiments.workspace import main

# wandb-workspaces declares its models in Pydantic's first style.
pytestmark = pytest.mark.filterwarnings("ignore:Pydantic V1 style:DeprecationWarning")


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*address: object) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def spec(offline: None, capsys: pytest.CaptureFixture[str]) -> Any:
    main(["--entity", "somebody", "--project", "digits", "--dry-run"])
    return json.loads(capsys.readouterr().out)


def panels(spec: Any) -> Iterator[Any]:
    for section in spec["spec"]["section"]["panelBankConfig"]["sections"]:
        yield from section["panels"]


def lines(spec: Any) -> list[Any]:
    return [panel["config"] for panel in panels(spec) if panel["viewType"] == "Run History Line Plot"]


def test_all_curves_are_against_examples_and_unsmoothed(spec: Any) -> None:
    assert (spec["entity"], spec["project"]) == ("somebody", "digits")
    section = spec["spec"]["section"]
    of_sections = [part["localPanelSettings"] for part in section["panelBankConfig"]["sections"]]
    for settings in [section["settings"], *of_sections, *lines(spec)]:
        assert settings["xAxis"] == AXIS and settings["smoothingType"] == "none"
    (runs,) = section["runSets"]
    assert [(key["section"], key["name"]) for key in runs["grouping"]] == [("run", "group")]


def test_every_panel_shows_what_a_run_logs(
    spec: Any, short: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: set[str] = set()
    monkeypatch.setattr(WandbTracker, "__init__", lambda self, *of_a_run: None)
    monkeypatch.setattr(WandbTracker, "__exit__", lambda self, *details: None)
    for name in ("log", "summarize"):
        monkeypatch.setattr(WandbTracker, name, lambda self, *values: logged.update(values[-1]))
    monkeypatch.setattr(WandbTracker, "table", lambda self, name, *table: logged.add(name))
    train(short("tracker=wandb", "tracker.detail=true", "train.epochs=0.5"), tmp_path)

    shown = {name for config in lines(spec) for name in config["metrics"]}
    assert len(shown) > 5 and shown <= logged
    for pattern in (config["metricRegex"] for config in lines(spec) if "metricRegex" in config):
        assert any(re.fullmatch(pattern, name) for name in logged), pattern
    scattered = [panel["config"] for panel in panels(spec) if panel["viewType"] == "Scatter Plot"]
    axes = {config[axis] for config in scattered for axis in ("xAxis", "yAxis")}
    (runs,) = spec["spec"]["section"]["runSets"]
    summaries = {
        name.removeprefix("summary:") for name in {*axes, *runs["runFeed"]["columnPinned"]} if "summary" in name
    }
    assert len(summaries) > 5 and summaries <= logged
    assert "hardest examples" in json.dumps(spec) and "hardest examples" in logged


def test_without_an_account_it_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from wandb_workspaces.workspaces import Workspace

    def fail(self: Workspace) -> None:
        raise ValueError("No API key configured.")

    monkeypatch.setattr(Workspace, "save", fail)
    with pytest.raises(SystemExit) as end:
        main(["--entity", "somebody"])
    assert end.value.code == 2
    assert (
        "not saved to somebody/gradstats: No API key configured. Log in with `wandb login`" in capsys.readouterr().err
    )


def test_with_an_account_it_is_saved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from wandb_workspaces.workspaces import Workspace

    saved: list[Workspace] = []
    monkeypatch.setattr(Workspace, "save", lambda self: saved.append(self))
    main(["--entity", "somebody", "--project", "digits"])
    assert [(workspace.entity, workspace.project) for workspace in saved] == [("somebody", "digits")]


def test_without_the_package_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    with pytest.raises(SystemExit) as end:
        main(["--entity", "somebody", "--dry-run"])
    assert end.value.code == 2
    assert "pip install 'gradstats[workspace]'" in capsys.readouterr().err
