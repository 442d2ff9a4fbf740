import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import laboratory
from experiments.errors import UserError
from experiments.jobs import Measurement, Result
from experiments.laboratory.quadratic import stationary_variance
from experiments.laboratory.schemas import TemperatureConfig
from experiments.laboratory.temperature.analysis import equal_temperatures
from experiments.laboratory.temperature.study import Temperature
from experiments.laboratory.temperature.wells import expected_excess
from experiments.launch import run_study
from experiments.schemas.run import Config
from experiments.study import Outcome

pytestmark = pytest.mark.usefixtures("few_resamples")

SETTINGS = TemperatureConfig(
    name="temperature",
    noise=1.0,
    repetitions=20,
    curvatures=[0.1, 1],
    rates=[0.1, 0.4],
    batch_sizes=[1, 4],
    penalty=0.3,
    well_rates=[0.1, 0.4],
    well_batch_sizes=[4, 16],
    method="batch_invariant_sgd",
    lr_multipliers=[0.5, 1, 2],
    factor=4,
    stages=2,
    stage=1024,
    points=2,
    cycles=3,
    members=2,
    cycle=512,
    seeds=[0, 1, 2],
    workers=1,
)
CURVATURES, NOISE = [0.1, 0.2], [1.0, 2.0]


def ensemble_of(loss: float) -> dict[str, float]:
    return {"validation": loss, "loss": loss, "accuracy": 0.9}


def cycled(
    ensemble: float = 0.1, along_cycles: float = 0.2, independent: float = 0.15, seed: int = 0
) -> dict[str, Any]:
    return {
        "cycles, ensemble": ensemble_of(ensemble + 1e-3 * seed),
        "cycles, last": ensemble_of(0.2),
        "one run, ensemble": ensemble_of(0.2),
        "one run, last": ensemble_of(0.2),
        "distance": {"cycles": along_cycles + 1e-3 * seed, "one run": 0.1, "independent": independent},
    }


def annealed(decays: bool, grows: bool, seed: int, smith: float = 0.0, kept: float = 0.0) -> dict[str, Any]:
    """Losses of the second stage: half as high after a decay, and with differences in ln(loss) where B grows."""
    differs = (smith if decays else kept) if grows else 0.0
    last = (0.5 if decays else 1.0) * np.exp(differs + 0.01 * seed)
    return {"examples": [512, 1024, 1536, 2048], "loss": [2.0, 1.0, last, last], "steps": 80 if grows else 128}


def outcome(config: Config, **changed: Callable[..., Any]) -> Outcome:
    """Of results as theory has them, but for measurements by the name of their function."""
    fake: dict[str, Callable[..., Any]] = {
        "quadratic_variance": lambda rate, batch_size, curvature, seed, **_: (
            stationary_variance(rate, 1 / batch_size, curvature) * (1 + 1e-3 * seed)
        ),
        "well_at_minimum": lambda **_: {"curvatures": CURVATURES, "noise": NOISE, "trace": 3.0},
        "well_excess": lambda rate, batch_size, seed, **_: (
            expected_excess(np.array(CURVATURES), np.array(NOISE), rate, batch_size) * (1 + 1e-3 * seed)
        ),
        "anneal": lambda decays, grows, seed, **_: annealed(decays, grows, seed),
        "snapshots": lambda seed, **_: cycled(seed=seed),
    }
    study = Temperature(SETTINGS)
    results = []
    for job in study.jobs(config, []):
        assert isinstance(job, Measurement)
        found = (fake | changed)[job.function.__name__](**job.coordinates)
        results.append(Result(job.coordinates, found, 1.0))
    return study.outcome(results)


@pytest.fixture
def config(short: Callable[..., Config]) -> Config:
    return dataclasses.replace(short("data.test_fraction=0.5", "train.warmup_examples=128"), study=SETTINGS)


def verdicts(of: Outcome) -> dict[str, str | None]:
    return {finding.bar: finding.verdict for finding in of.findings}


def test_theory_holds_but_where_steps_are_long(config: Config) -> None:
    found = verdicts(outcome(config))
    failing = {bar: verdict for bar, verdict in found.items() if bar and verdict != "holds"}
    assert len([bar for bar in found if bar]) == 11
    # At h = 1: (2 - 0.1) / (2 - 0.4) is 19% above 1.
    assert failing == {
        "On a quadratic of curvature 1, runs of equal eta/B have equal variances, within 10%": "does not hold"
    }


@pytest.mark.parametrize(
    ("function", "found", "words"),
    [
        ("quadratic_variance", lambda **_: 1.0, "stationary variance"),
        ("quadratic_variance", lambda batch_size, **_: 1 / batch_size, "of curvature 0.1"),
        ("well_excess", lambda rate, batch_size, **_: 2 * rate / batch_size, "Hessian and gradient noise"),
        ("well_excess", lambda rate, batch_size, **_: (rate / batch_size) ** 2, "proportional"),
        ("well_excess", lambda rate, batch_size, **_: rate / batch_size**2, "equal excess losses"),
        ("anneal", lambda decays, grows, seed, **_: annealed(decays, grows, seed, smith=0.2), "same curve"),
        ("anneal", lambda decays, grows, seed, **_: annealed(decays, grows, seed, kept=0.2), "changes nothing"),
        ("snapshots", lambda seed, **_: cycled(ensemble=0.3, seed=seed), "lower test loss"),
        ("snapshots", lambda seed, **_: cycled(along_cycles=0.05, seed=seed), "Cycles explore"),
        ("snapshots", lambda seed, **_: cycled(independent=0.4, seed=seed), "as far apart"),
    ],
)
def test_what_is_not_as_claimed_does_not_hold(
    config: Config, function: str, found: Callable[..., Any], words: str
) -> None:
    (verdict,) = (v for bar, v in verdicts(outcome(config, **{function: found})).items() if words in bar)
    assert verdict == "does not hold"


def test_annealing_is_judged_at_the_learning_rate_where_it_fails(config: Config) -> None:
    def one_fails(decays: bool, grows: bool, seed: int, lr: float, **_: Any) -> dict[str, Any]:
        return annealed(decays, grows, seed, smith=0.3 if lr > 0.03 else 0.0)

    (finding,) = (f for f in outcome(config, anneal=one_fails).findings if "same curve" in f.bar)
    assert finding.verdict == "does not hold"
    assert "0.300 [0.300, 0.300] at 2 times" in finding.sentence


def test_a_tuned_rate_at_an_edge_is_noted(config: Config) -> None:
    def best_in_the_middle(lr: float, seed: int, **_: Any) -> dict[str, Any]:
        worse = 0.0 if 0.02 < lr < 0.03 else 1.0
        return {
            name: {key: value + worse for key, value in found.items()} if name != "distance" else found
            for name, found in cycled(seed=seed).items()
        }

    assert not any("at an edge" in f.sentence for f in outcome(config, snapshots=best_in_the_middle).findings)
    assert any("at an edge" in f.sentence for f in outcome(config).findings)


def test_equal_temperatures_are_found() -> None:
    assert equal_temperatures([0.1, 0.4], [1, 4]) == {0.1: [(0, 0), (1, 1)]}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_sizes": [1, 2]}, r"study.rates=\[0.1, 0.4\]: no two"),
        ({"rates": [0.5, 2.0]}, "study.rates: eta h = 2 is not below 2"),
        ({"members": 4}, "study.members=4 must be from 2 to study.cycles=3"),
        ({"stages": 1}, "study.stages=1 and study.factor=4 must be 2 or more"),
    ],
)
def test_wrong_settings_are_a_user_error(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        laboratory.load(dataclasses.replace(SETTINGS, **values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stage": 1000}, "study.stage=1000 must be a multiple of study.points=2 times the largest batch, 64"),
        ({"cycle": 520}, "study.cycle=520 must be a multiple of train.batch_size=16"),
        ({"cycle": 128}, "train.warmup_examples=128"),
        ({"method": "adam"}, "study.method=adam: schedules in examples need one of ours"),
    ],
)
def test_what_does_not_fit_the_training_is_a_user_error(config: Config, values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Temperature(dataclasses.replace(SETTINGS, **values)).jobs(config, [])


def test_a_miniature_ends_with_report_and_figure(
    short: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = short("data.test_fraction=0.9", "train.warmup_examples=128", "model.widths=[8]")
    settings = dataclasses.replace(
        SETTINGS, seeds=[0, 1], lr_multipliers=[1], stage=256, cycle=256, curvatures=[1], penalty=1.0
    )
    config = dataclasses.replace(config, name="small", study=settings)
    run_study(config, tmp_path)
    assert "Excess loss on the data" in capsys.readouterr().out
    assert (tmp_path / "report.html").exists() and (tmp_path / "figure.png").exists()


def test_files_of_the_configuration_fit(short: Callable[..., Config], tmp_path: Path) -> None:
    full, cut = (short(f"experiment={name}") for name in ("temperature", "short/temperature"))
    for config in (full, cut):
        assert config.study is not None
        laboratory.load(config.study).jobs(dataclasses.replace(config, directory=str(tmp_path)), [])
    assert full.directory != cut.directory
