import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import laboratory
from experiments.config import compose_config
from experiments.errors import UserError
from experiments.jobs import Result
from experiments.laboratory.adam_and_friends.race import CALM, METHODS
from experiments.laboratory.adam_and_friends.study import AdamAndFriends
from experiments.laboratory.schemas import AdamAndFriendsConfig
from experiments.launch import run_study
from experiments.schemas.run import Config
from experiments.study import Outcome
from experiments.themes import DARK
from tests.experiments.conftest import SHORT

SETTINGS = AdamAndFriendsConfig(
    name="adam_and_friends",
    batch_size=32,
    steps=40,
    every=10,
    target=0.5,
    lr_multipliers=[0.5, 1.0, 2.0],
    tuning_seeds=[7],
    seeds=[0, 1, 2],
    workers=1,
)
STEPS = [0, 10, 20, 30, 40]
# Looks until the target, and milliseconds a step: each refinement halves the first.
LOOKS = {"full_batch": 4, "sgd": 3, "momentum": 2, "rmsprop": 2, "adam": 1}


@pytest.fixture(scope="module")
def config() -> Config:
    composed = compose_config([*SHORT, "model.widths=[8]", "model.dropout=0"])
    return dataclasses.replace(composed, name="small", study=SETTINGS)


def found(coordinates: dict[str, Any], looks: dict[str, int], slow: dict[str, float], apart: float) -> dict[str, Any]:
    method, seed = coordinates["method"], coordinates["seed"]
    worse = 0 if coordinates["lr"] == METHODS[method].lr else 2
    reached = looks[method] + worse
    loss: list[float | None] = [2.3 if look < reached else 0.4 + 0.01 * seed for look in range(len(STEPS))]
    if coordinates["side"] == "ours":
        loss = [value + apart for value in loss if value is not None]
    step = 1e-3 * slow.get(method, 1.0) * (1 + 0.01 * seed)
    return {"steps": STEPS, "loss": loss, "seconds": [n * step for n in STEPS], "step": step}


def results(
    config: Config, looks: dict[str, int] = LOOKS, slow: dict[str, float] | None = None, apart: float = 1e-10
) -> list[Result]:
    study, known = AdamAndFriends(SETTINGS), list[Result]()
    for _ in range(2):
        known = [
            Result(job.coordinates, found(job.coordinates, looks, slow or {}, apart), 1.0)
            for job in study.jobs(config, known)
        ]
    return known


def outcome(config: Config, **changes: Any) -> Outcome:
    return AdamAndFriends(SETTINGS).outcome(results(config, **changes))


def verdicts(of: Outcome, words: str) -> list[str | None]:
    return [finding.verdict for finding in of.findings if words in finding.bar]


@pytest.fixture(scope="module")
def holding(config: Config) -> Outcome:
    return outcome(config)


def test_everything_that_is_claimed_can_hold(holding: Outcome) -> None:
    assert verdicts(holding, "on torch's curve") == ["holds"] * 5
    assert verdicts(holding, "in fewer steps") == ["holds"] * 4
    assert verdicts(holding, "in less time") == ["holds"]


def test_curves_that_part_do_not_hold(config: Config) -> None:
    apart = outcome(config, apart=1e-3)
    assert verdicts(apart, "on torch's curve") == ["does not hold"] * 5
    assert "is 0.001 nats" in apart.findings[0].sentence


def test_more_steps_do_not_hold(config: Config) -> None:
    assert verdicts(outcome(config, looks=LOOKS | {"adam": 3}), "Adam reaches") == ["does not hold"] * 2


def test_slower_steps_do_not_hold(config: Config) -> None:
    slower = outcome(config, slow={"rmsprop": 2.0, "full_batch": 0.5})
    assert verdicts(slower, "RMSProp reaches") == verdicts(slower, "in less time") == ["does not hold"]


def test_a_target_that_is_missed_cannot_be_judged(config: Config) -> None:
    missed = outcome(config, looks=LOOKS | {"full_batch": 9})
    assert verdicts(missed, "than full-batch descent") == ["cannot be judged"]
    assert any("misses 0.5 nats with 3 of 3 seeds" in finding.sentence for finding in missed.findings)


def test_one_that_is_not_finite_alone_is_not_on_the_curve(config: Config) -> None:
    known = results(config)
    for result in known:
        if (result.coordinates["side"], result.coordinates["double"]) == ("ours", True):
            result.found["loss"][-1] = None
    assert verdicts(AdamAndFriends(SETTINGS).outcome(known), "on torch's curve") == ["does not hold"] * 5


def test_every_method_is_tuned_on_seeds_of_its_own(config: Config) -> None:
    study = AdamAndFriends(SETTINGS)
    first = study.jobs(config, [])
    assert len(first) == 5 * 3 and {job.coordinates["seed"] for job in first} == {7}
    known = [Result(job.coordinates, found(job.coordinates, LOOKS, {}, 0.0), 1.0) for job in first]
    second = study.jobs(config, known)[len(first) :]
    assert len(second) == 5 * (3 + 2) * 3
    for job in second:
        share = CALM if job.coordinates["double"] else 1
        assert job.coordinates["lr"] == METHODS[str(job.coordinates["method"])].lr * share


def test_seeds_of_the_comparison_tune_nothing(config: Config) -> None:
    known = results(config)
    for result in known:
        if result.coordinates["seed"] != 7:
            result.found["loss"] = [2.3] * len(STEPS)
    tuning = AdamAndFriends(SETTINGS).outcome(known).tables[1]
    assert tuning.rows[1] == ["SGD", "0.5", "80", "30", "80"]


def test_a_tuned_lr_at_an_edge_is_noted(config: Config, holding: Outcome) -> None:
    assert not any("edge of the grid" in finding.sentence for finding in holding.findings)
    cut = dataclasses.replace(SETTINGS, lr_multipliers=[1.0, 2.0, 4.0])
    known = [r for r in results(config) if r.coordinates["lr"] != 0.5 * METHODS[str(r.coordinates["method"])].lr]
    four = [dict(r.coordinates, lr=2 * float(r.coordinates["lr"])) for r in known if r.coordinates["seed"] == 7]  # type: ignore[arg-type]
    extra = [Result(c, found(c, LOOKS, {}, 0.0), 1.0) for c in four if c["lr"] == 4 * METHODS[str(c["method"])].lr]
    text = " ".join(f.sentence for f in AdamAndFriends(cut).outcome([*known, *extra]).findings)
    assert "edge of the grid, and may be better beyond it, for: full-batch descent; SGD" in text


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr_multipliers": [1.0, 0.5, 2.0]}, "three or more, in ascending order"),
        ({"every": 15}, "study.every=15 must divide study.steps=40"),
        ({"tuning_seeds": [2]}, r"study.tuning_seeds=\[2\] and study.seeds=\[0, 1, 2\] have seeds in common"),
    ],
)
def test_wrong_settings_are_a_user_error(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        laboratory.load(dataclasses.replace(SETTINGS, **values))


def test_another_model_is_a_user_error(config: Config) -> None:
    convnet = dataclasses.replace(config, model=compose_config(["model=convnet"]).model)
    with pytest.raises(UserError, match="model=convnet: adam_and_friends trains model=mlp"):
        AdamAndFriends(SETTINGS).jobs(convnet, [])


def test_the_figure_is_drawn_in_the_dark_too(holding: Outcome) -> None:
    assert np.size(holding.draw(DARK).subfigs) == 2


def test_a_miniature_ends_with_report_and_figure(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = dataclasses.replace(SETTINGS, steps=20, seeds=[0])
    run_study(dataclasses.replace(config, study=tiny), tmp_path)
    out = " ".join(capsys.readouterr().out.split())
    assert "Adam: ours, at torch's values and batch size, is on torch's curve: holds" in out
    assert (tmp_path / "report.html").exists() and (tmp_path / "figure.png").exists()


def test_files_of_the_configuration_fit() -> None:
    full, cut = (compose_config([f"experiment={name}"]) for name in ("adam_and_friends", "short/adam_and_friends"))
    for config in (full, cut):
        assert config.study is not None
        laboratory.load(config.study)
    assert full.directory != cut.directory
