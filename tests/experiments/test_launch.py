"""A study from its configuration to its report: what runs, where it is kept, and how it continues."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from experiments import jobs, laboratory
from experiments.description import OUTCOME, Description, Summary
from experiments.errors import UserError
from experiments.jobs import Job, Result
from experiments.laboratory.schemas import BatchSizeInvarianceConfig
from experiments.launch import finish, refuse_unread, run_study
from experiments.record import FILE, Record
from experiments.schemas.run import Config
from experiments.study import Outcome, Study
from tests.experiments.laboratory.settings import INVARIANCE, planned

Make = Callable[..., Config]


def itself(x: int) -> int:
    return x


class Doubling(Study[BatchSizeInvarianceConfig]):
    title, question, source = "", "", ""

    def jobs(self, config: Config, known: Sequence[Result]) -> list[Job]:
        doubled = [2 * result.found for result in known if result.found < 4]
        return [self.measurement(config, itself, x=x) for x in [1, *doubled]]

    def outcome(self, results: Sequence[Result]) -> Outcome:
        raise AssertionError


@pytest.fixture
def config(short: Make) -> Config:
    return dataclasses.replace(short("train.epochs=0.5"), name="small", study=INVARIANCE)


def changed(config: Config, **values: Any) -> Config:
    return dataclasses.replace(config, study=dataclasses.replace(INVARIANCE, **values))


def test_a_study_ends_with_report_and_figure_and_is_recognised(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_study(config, tmp_path)
    out = capsys.readouterr().out
    assert "12 jobs, 0 of them finished before" in out and "Adam, fixed" in out
    assert all((tmp_path / name).exists() for name in ("report.html", "figure.png", "figure.svg"))
    assert len(Description.load(tmp_path).jobs) == 12
    assert Summary.load(tmp_path).jobs == 12
    assert all(job.is_finished() for job in planned(config, tmp_path))

    ran: list[Job] = []
    monkeypatch.setattr(jobs, "run_one", lambda board, index, job: ran.append(job))
    run_study(config, tmp_path)
    assert ran == []


def test_an_interrupted_study_keeps_what_is_finished(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_one = jobs.run_one

    def interrupted(board: Path, index: int, job: Job) -> None:
        if index == 3:
            raise KeyboardInterrupt
        run_one(board, index, job)

    monkeypatch.setattr(jobs, "run_one", interrupted)
    with pytest.raises(SystemExit) as end:
        run_study(config, tmp_path)
    assert end.value.code == 130
    assert "the same command continues" in capsys.readouterr().out
    assert sum(job.is_finished() for job in planned(config, tmp_path)) == 3

    monkeypatch.setattr(jobs, "run_one", run_one)
    run_study(config, tmp_path)
    assert "12 jobs, 3 of them finished before" in capsys.readouterr().out


def test_a_diverged_run_is_a_result(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    huge = changed(config, lr_multipliers=[1.0, 1e30])
    run_study(huge, tmp_path)
    found = [(job, Record.load(job.directory / FILE)) for job in planned(huge, tmp_path)]
    statuses = {(job.coordinates["method"], result.lr > 1e6): result.status for job, result in found}
    assert statuses["adam", False] == "finished"
    assert statuses["sgd_linear", True] == "diverged"
    assert "diverged" in capsys.readouterr().out


def test_studies_that_name_the_same_place_share_their_runs(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = changed(config, runs=str(tmp_path / "common"))
    run_study(common, tmp_path / "first")
    capsys.readouterr()
    run_study(common, tmp_path / "second")
    assert "12 jobs, 12 of them finished before" in capsys.readouterr().out
    assert not (tmp_path / "second" / "runs").exists()
    first, second = (Summary.load(tmp_path / name).findings for name in ("first", "second"))
    assert first == second


def test_rounds_go_on_until_results_ask_for_nothing_new(config: Config, tmp_path: Path) -> None:
    """A study that measures 1, and then its double, and then the double of that."""
    study = Doubling(BatchSizeInvarianceConfig(name="doubling", seeds=[0], workers=1))
    finish(study, dataclasses.replace(config, directory=str(tmp_path)), tmp_path, Console(quiet=True))
    found = Description.load(tmp_path).jobs
    assert [place.coordinates["x"] for place in found] == [1, 2, 4]


def test_what_was_found_with_other_settings_goes_before_anything_runs(config: Config, tmp_path: Path) -> None:
    (tmp_path / OUTCOME).write_text("{}")
    study = Doubling(BatchSizeInvarianceConfig(name="doubling", seeds=[0], workers=1))
    finish(study, dataclasses.replace(config, directory=str(tmp_path)), tmp_path, Console(quiet=True))
    assert not (tmp_path / OUTCOME).exists()


def test_without_a_study_there_is_one_message(config: Config, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="study=null"):
        run_study(dataclasses.replace(config, study=None), tmp_path)


def test_an_unknown_study_is_named(config: Config, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"study.name=nobody is unknown: choose one of .*batch_size_invariance"):
        run_study(changed(config, name="nobody"), tmp_path)


@pytest.mark.slow
def test_in_processes_with_the_tracker(short: Make, tmp_path: Path) -> None:
    config = dataclasses.replace(short("tracker=wandb"), name="small", study=changed(short(), workers=2).study)
    run_study(config, tmp_path)
    assert len(list(tmp_path.glob("runs/*/wandb/offline-run-*"))) == 12
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 1


@pytest.mark.parametrize("override", ["optimizer=adam", "train.batch_size=8", "seed=1", "search=learning_rate"])
def test_an_override_that_would_change_nothing_is_refused(override: str) -> None:
    study = laboratory.load(INVARIANCE)
    key = override.partition("=")[0]
    message = f"{override}: batch_size_invariance does not read {key}, and has settings of its own: .*study.batch_sizes"
    with pytest.raises(UserError, match=message):
        refuse_unread(study, ["experiment=demo", override])


def test_overrides_of_what_a_study_reads_are_its_user_s() -> None:
    given = [
        "experiment=demo",
        "study.seeds=[1]",
        "train.epochs=2",
        "model.dropout=0",
        "+tracker.detail=true",
        "data=npz",
    ]
    refuse_unread(laboratory.load(INVARIANCE), given)
