import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import laboratory
from experiments.errors import UserError
from experiments.jobs import Result
from experiments.laboratory.running_averages.analysis import LABELS
from experiments.laboratory.running_averages.smoothing import AVERAGES, trace
from experiments.laboratory.running_averages.study import RunningAverages
from experiments.laboratory.schemas import RunningAveragesConfig
from experiments.launch import run_study
from experiments.schemas.run import Config
from experiments.study import Outcome

SETTINGS = RunningAveragesConfig(
    name="running_averages",
    horizons=[8, 16],
    shown=8,
    examples=80,
    period=40,
    offset=1.0,
    noise=2.0,
    draws=8,
    seeds=[0, 1, 2],
    workers=1,
)


def found(horizon: int, random: np.random.Generator, **changes: Any) -> dict[str, Any]:
    """As the sources have it, with noise of a thousandth; `changes` are factors by the name of a number."""

    def number(value: float, name: str) -> float:
        return float(value * changes.get(name, 1.0) * (1 + 1e-3 * random.normal()))

    share = SETTINGS.noise**2 / (2 * horizon - 1)
    lag = {"window": 0.2, "mean": 0.5}
    debiased = {"ewma": 0.1}
    return {
        "noise": [[[number(0.3, f"warm-up {kind}"), number(share, kind)]] * 2 for kind in AVERAGES],
        "tracking": [[[0.0, 0.0], [number(0.1, "lag"), number(lag.get(kind, 0.1), kind)]] for kind in AVERAGES],
        "noise_at_horizon": [number(SETTINGS.noise**2 / horizon, "")] * len(AVERAGES),
        "level": [number(debiased.get(kind, 1.0), "") for kind in AVERAGES],
        "level_of_start": [number(1.0, "start")] * len(AVERAGES),
        "apart": [0.0 if kind == "slides" else number(0.05, "apart") for kind in AVERAGES],
    }


def outcome(**changes: float) -> Outcome:
    random = np.random.default_rng(0)
    results = [
        Result({"horizon": horizon, "seed": seed, "draws": 8}, found(horizon, random, **changes), 1.0)
        for horizon in SETTINGS.horizons
        for seed in SETTINGS.seeds
    ]
    shown = Result({"horizon": 8, "seed": 0}, trace(8, 80, 40, 1.0, 2.0, 0), 1.0)
    return RunningAverages(SETTINGS).outcome([*results, shown])


def verdict(of: Outcome, words: str) -> str | None:
    (finding,) = (finding for finding in of.findings if words in finding.bar)
    return finding.verdict


@pytest.mark.parametrize(
    ("words", "holding", "failing"),
    [
        ("factor 1 - beta^t", {}, {"start": 2.0}),
        ("EWMA, debiased is the simple mean", {}, {"apart": 10.0}),
        ("EWMA from zero keeps the share", {}, {"ewma": 1.5}),
        ("EWMA, debiased keeps the share", {}, {"debiased_ewma": 1.5}),
        ("keeps 1/N", {"slides": 15.5 / 8}, {}),
        ("better than a window", {}, {"window": 0.3}),
        ("lower total error on a cosine", {"warm-up slides": 0.5}, {"warm-up slides": 1.5}),
    ],
)
def test_claims_are_judged_both_ways(words: str, holding: dict[str, float], failing: dict[str, float]) -> None:
    assert verdict(outcome(**holding), words) == "holds"
    assert verdict(outcome(**failing), words) == "does not hold"


def test_numbers_are_in_units_of_the_datas_noise() -> None:
    table = outcome().tables[1]
    assert [row[1] for row in table.rows] == ["0.0667", "0.0323"]
    assert [float(row[2].value) for row in table.rows] == pytest.approx([1 / 15, 1 / 31], rel=0.01)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"shown": 32}, r"study.shown=32 must be one of study.horizons=\[8, 16\]"),
        ({"horizons": [4, 8]}, "must be 8 examples or more"),
        ({"examples": 60}, "study.examples=60, .* must be at least 62"),
    ],
)
def test_wrong_settings_are_a_user_error(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        laboratory.load(dataclasses.replace(SETTINGS, **values))


def test_a_miniature_ends_with_report_and_figure(
    short: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_study(dataclasses.replace(short(), name="small", study=SETTINGS), tmp_path)
    out = capsys.readouterr().out
    assert "7 jobs" in out and all(label in out for label in LABELS.values())
    assert (tmp_path / "report.html").exists() and (tmp_path / "figure.png").exists()


def test_files_of_the_configuration_fit(short: Callable[..., Config]) -> None:
    full, cut = (short(f"experiment={name}") for name in ("running_averages", "short/running_averages"))
    for config in (full, cut):
        assert config.study is not None
        laboratory.load(config.study)
    assert full.directory != cut.directory
