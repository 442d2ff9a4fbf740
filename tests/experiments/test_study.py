import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments import record, study
from experiments.config import Config, StudyConfig, fingerprint
from experiments.errors import UserError
from experiments.record import Record
from experiments.report import Description
from experiments.study import is_finished, plan, read_study, run_study

SETTING = StudyConfig(
    note="",
    ours=["batch_invariant_adam"],
    baselines=["adam", "sgd_linear"],
    reference="adam",
    tuning_batch_size=16,
    lr_multipliers=[0.5, 1.0],
    batch_sizes=[16, 64],
    score_batch_sizes=[16, 64],
    seeds=[0],
    workers=1,
)
Make = Callable[..., Config]


@pytest.fixture
def config(short: Make) -> Config:
    return dataclasses.replace(short("train.epochs=0.5"), name="small", study=SETTING)


def changed(config: Config, **values: Any) -> Config:
    return dataclasses.replace(config, study=dataclasses.replace(SETTING, **values))


def runs_of(config: Config, directory: Path) -> list[Config]:
    return plan(config, read_study(config), directory, group="group")


def test_every_combination_runs_once_in_its_own_directory(config: Config, tmp_path: Path):
    runs = runs_of(config, tmp_path)
    assert len(runs) == 3 * 2 * 2
    assert len({run.directory for run in runs}) == len({fingerprint(run) for run in runs}) == len(runs)


def test_the_grid_multiplies_each_methods_own_lr(config: Config, tmp_path: Path):
    runs = runs_of(config, tmp_path)
    for method in ("batch_invariant_adam", "adam", "sgd_linear"):
        rates = {run.optimizer.lr for run in runs if run.optimizer.name == method}
        own = study.default_optimizer(method).lr
        assert rates == {0.5 * own, own}


def test_all_is_tuned_at_one_batch_size_and_tracked_in_one_group(config: Config, tmp_path: Path):
    for run in runs_of(changed(config, tuning_batch_size=64), tmp_path):
        assert run.optimizer.batch_size == 64
        assert (run.tracker.group, run.tracker.job_type) == ("group", run.optimizer.name)
        assert run.study is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seeds": []}, r"study.seeds: \[\] must have one value or more"),
        ({"ours": []}, r"study.ours: \[\] must have one value or more"),
        ({"batch_sizes": [16, 64, 16]}, r"study.batch_sizes: .* each of them once"),
        ({"baselines": ["adam", "batch_invariant_adam"]}, "study.ours and study.baselines: .* each of them once"),
        ({"score_batch_sizes": [16]}, "two batch sizes or more"),
        ({"score_batch_sizes": [1, 16]}, r"score_batch_sizes has \[1\]"),
        ({"tuning_batch_size": 4}, r"tuning_batch_size has \[4\]"),
        ({"reference": "adam_linear"}, r"reference has \['adam_linear'\]"),
    ],
)
def test_a_wrong_study_is_a_user_error(config: Config, values: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        read_study(changed(config, **values))


def test_an_unknown_method_is_a_user_error(config: Config, tmp_path: Path):
    with pytest.raises(UserError, match="adamm"):
        runs_of(changed(config, ours=["adamm"]), tmp_path)


def test_a_study_ends_with_report_and_figure_and_is_recognised(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    run_study(config, tmp_path)
    out = capsys.readouterr().out
    assert "12 runs" in out and "0 of them finished before" in out and "Adam, fixed" in out
    assert all((tmp_path / name).exists() for name in ("report.html", "figure.png", "figure.svg"))
    assert len(Description.load(tmp_path).runs) == 12
    assert all(map(is_finished, runs_of(config, tmp_path)))

    trained: list[str] = []
    monkeypatch.setattr(study, "run_one", lambda board, index, run: trained.append(run.name))
    run_study(config, tmp_path)
    assert trained == []


def test_an_interrupted_study_keeps_what_is_finished(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    run_one = study.run_one

    def interrupted(board: Path, index: int, run: Config) -> None:
        if index == 3:
            raise KeyboardInterrupt
        run_one(board, index, run)

    monkeypatch.setattr(study, "run_one", interrupted)
    with pytest.raises(SystemExit) as end:
        run_study(config, tmp_path)
    assert end.value.code == 130
    assert "3 of 12 runs are kept, and the same command continues" in capsys.readouterr().out

    monkeypatch.setattr(study, "run_one", run_one)
    run_study(config, tmp_path)
    assert "3 of them finished before" in capsys.readouterr().out


def test_a_diverged_run_is_a_result(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    huge = changed(config, lr_multipliers=[1.0, 1e30])
    run_study(huge, tmp_path)
    statuses = {
        (run.optimizer.name, run.optimizer.lr > 1e6): Record.load(Path(run.directory) / record.FILE).status
        for run in runs_of(huge, tmp_path)
    }
    assert statuses["adam", False] == "finished"
    assert statuses["sgd_linear", True] == "diverged"
    assert "diverged" in capsys.readouterr().out


def test_long_runs_come_first(config: Config, tmp_path: Path):
    sizes = [run.train.batch_size for run in sorted(runs_of(config, tmp_path), key=study.cost, reverse=True)]
    assert sizes == sorted(sizes)


@pytest.mark.parametrize(("name", "runs"), [("batch_size_invariance", 7 * 6 * 5 * 5), ("demo", None)])
def test_the_studies_of_the_configuration_can_be_planned(short: Make, tmp_path: Path, name: str, runs: int | None):
    config = short(f"experiment={name}")
    planned = runs_of(config, tmp_path)
    assert runs is None or len(planned) == runs
    assert config.study is not None and bool(config.study.note) == (name == "demo")
    shared = math.lcm(*(run.train.batch_size for run in planned))
    assert config.evaluation.multiple % shared == 0  # so that all batch sizes are evaluated at the same counts


@pytest.mark.slow
def test_in_processes_with_the_tracker(short: Make, tmp_path: Path):
    config = dataclasses.replace(short("tracker=wandb"), name="small", study=dataclasses.replace(SETTING, workers=2))
    run_study(config, tmp_path)
    assert len(list(tmp_path.glob("runs/*/wandb/offline-run-*"))) == 12
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 1
