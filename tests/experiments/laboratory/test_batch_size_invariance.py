import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments import laboratory
from experiments.errors import UserError
from experiments.jobs import Training
from experiments.schemas.run import Config
from experiments.study import default_optimizer
from tests.experiments.laboratory.settings import INVARIANCE, planned

Make = Callable[..., Config]


@pytest.fixture
def config(short: Make) -> Config:
    return dataclasses.replace(short("train.epochs=0.5"), name="small", study=INVARIANCE)


def runs(config: Config, directory: Path) -> list[Config]:
    return [job.config for job in planned(config, directory) if isinstance(job, Training)]


def changed(config: Config, **values: Any) -> Config:
    return dataclasses.replace(config, study=dataclasses.replace(INVARIANCE, **values))


def test_every_combination_runs_once_in_its_own_directory(config: Config, tmp_path: Path) -> None:
    jobs = planned(config, tmp_path)
    assert len(jobs) == len({job.directory for job in jobs}) == 3 * 2 * 2


def test_the_grid_multiplies_each_methods_own_lr(config: Config, tmp_path: Path) -> None:
    for method in ("batch_invariant_adam", "adam", "sgd_linear"):
        rates = {run.optimizer.lr for run in runs(config, tmp_path) if run.optimizer.name == method}
        own = default_optimizer(method).lr
        assert rates == {0.5 * own, own}


def test_all_is_tuned_at_one_batch_size_and_tracked_by_its_method(config: Config, tmp_path: Path) -> None:
    for run in runs(changed(config, tuning_batch_size=64), tmp_path):
        assert run.optimizer.batch_size == 64
        assert run.tracker.job_type == run.optimizer.name
        assert run.study is None and run.resume


def test_long_runs_come_first(config: Config, tmp_path: Path) -> None:
    jobs = sorted(planned(config, tmp_path), key=lambda job: job.cost, reverse=True)
    sizes = [job.coordinates["batch_size"] for job in jobs]
    assert sizes == sorted(sizes)  # type: ignore[type-var]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seeds": []}, r"study.seeds: \[\] must have one value or more"),
        ({"ours": []}, r"study.ours: \[\] must have one value or more"),
        ({"batch_sizes": [16, 64, 16]}, r"study.batch_sizes: .* each of them once"),
        (
            {"baselines": ["adam", "batch_invariant_adam"]},
            "study.baselines and study.kin: .* each method once",
        ),
        ({"score_batch_sizes": [16]}, "two batch sizes or more"),
        ({"score_batch_sizes": [1, 16]}, r"score_batch_sizes has \[1\]"),
        ({"tuning_batch_size": 4}, r"tuning_batch_size has \[4\]"),
        ({"reference": "adam_linear"}, r"reference has \['adam_linear'\]"),
    ],
)
def test_wrong_settings_are_a_user_error(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        laboratory.load(dataclasses.replace(INVARIANCE, **values))


def test_an_unknown_method_is_a_user_error(config: Config, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="adamm"):
        planned(changed(config, ours=["adamm"]), tmp_path)


@pytest.mark.parametrize("name", ["batch_size_invariance", "demo"])
def test_the_studies_of_the_configuration_are_evaluated_at_common_counts(
    short: Make, tmp_path: Path, name: str
) -> None:
    config = short(f"experiment={name}")
    assert config.study is not None and bool(config.study.note) == (name == "demo")
    shared = math.lcm(*(run.train.batch_size for run in runs(config, tmp_path)))
    assert config.evaluation.multiple % shared == 0
