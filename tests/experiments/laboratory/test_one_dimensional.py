import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiments import laboratory
from experiments.errors import UserError
from experiments.jobs import Measurement, Result
from experiments.laboratory.one_dimensional.analysis import EDGE
from experiments.laboratory.one_dimensional.runs import counts, descend, descend_without_noise, gradient_at_minimum
from experiments.laboratory.one_dimensional.study import OneDimensional
from experiments.laboratory.quadratic import moments, power_rates
from experiments.laboratory.schemas import OneDimensionalConfig
from experiments.launch import run_study
from experiments.schemas.run import Config
from experiments.study import Outcome

pytestmark = pytest.mark.usefixtures("few_resamples")

SETTINGS = OneDimensionalConfig(
    name="one_dimensional",
    noise=1.0,
    start=3.0,
    repetitions=20,
    batch_sizes=[1, 4],
    scale=0.5,
    powers=[0, 0.25, 1, 2],
    steps=512,
    rates=[0.5, 2, 2.05],
    rate_steps=32,
    seeds=[0, 1, 2],
    workers=1,
)


def test_the_gradient_at_the_minimum_is_minus_the_mean_of_the_batch() -> None:
    y = 2.0 * torch.randn(4, 50, generator=torch.Generator().manual_seed(7))
    assert gradient_at_minimum(4, 2.0, 50, 7) == pytest.approx(float(y.mean(0).square().mean()))


def test_without_noise_descent_is_the_recursion_of_the_mean() -> None:
    found = descend(0.5, 0.75, 1, 40, noise=0.0, start=3.0, repetitions=2, seed=0)
    mean, _ = moments(power_rates(0.5, 0.75, 40), 0.0, 3.0)
    exact = mean[np.array(counts(40)) - 1]
    assert found["mean"] == pytest.approx(exact, rel=1e-4)
    assert found["square"] == pytest.approx(exact**2, rel=1e-4)


@pytest.mark.parametrize(("power", "batch_size"), [(0, 1), (0.25, 4), (1, 1), (2, 4)])
def test_noise_adds_the_recursion_of_the_variance(power: float, batch_size: int) -> None:
    found = descend(0.5, power, batch_size, 40, noise=1.0, start=3.0, repetitions=20_000, seed=0)
    mean, variance = moments(power_rates(0.5, power, 40), 1 / batch_size, 3.0)
    at = np.array(counts(40)) - 1
    assert found["square"] == pytest.approx((mean**2 + variance)[at], rel=0.04)  # 4 standard errors of a variance


@pytest.mark.parametrize("rate", [0.5, 1.5, 2.0, 2.05])
def test_without_noise_errors_are_powers(rate: float) -> None:
    errors = descend_without_noise(rate, 20, 3.0, seed=1)
    assert errors == pytest.approx(3.0 * (1 - rate) ** np.arange(21), abs=1e-12)


def outcome(config: Config, **changed: Callable[..., Any]) -> Outcome:
    """Of results as theory has them, but for measurements by the name of their function."""

    def expected(rates: np.ndarray, batch_size: int, seed: int) -> dict[str, list[float]]:
        mean, variance = moments(rates, 1 / batch_size, 3.0)
        at = np.array(counts(len(rates))) - 1
        factor = 1 + 1e-3 * (seed - 1)
        return {"mean": (mean[at] * factor).tolist(), "square": ((mean**2 + variance)[at] * factor).tolist()}

    fake: dict[str, Callable[..., Any]] = {
        "gradient_at_minimum": lambda batch_size, **_: 1 / batch_size,
        "descend": lambda scale, power, steps, batch_size, seed, **_: expected(
            power_rates(scale, power, steps), batch_size, seed
        ),
        "descend_without_noise": lambda rate, steps, start, seed: (start * (1 - rate) ** np.arange(steps + 1)).tolist(),
    }
    study = OneDimensional(SETTINGS)
    results = []
    for job in study.jobs(config, []):
        assert isinstance(job, Measurement)
        found = (fake | changed)[job.function.__name__](**job.coordinates)
        results.append(Result(job.coordinates, found, 1.0))
    return study.outcome(results)


def verdicts(of: Outcome) -> dict[str, str | None]:
    return {finding.bar: finding.verdict for finding in of.findings}


def test_theory_holds_but_for_slow_decay_which_converges_too(short: Callable[..., Config]) -> None:
    found = verdicts(outcome(short()))
    failing = [bar for bar, verdict in found.items() if verdict != "holds"]
    assert len(found) == 2 + 4 + 4
    assert len(failing) == 1 and failing[0].startswith("eta = 0.5 / t^0.25, with an infinite sum of squares")
    assert found[failing[0]] == "does not hold"


@pytest.mark.parametrize(
    ("function", "found", "words"),
    [
        ("gradient_at_minimum", lambda batch_size, **_: 1 / batch_size**2, "At the minimum"),
        ("descend_without_noise", lambda rate, steps, **_: [3.0] * (steps + 1), "eta below 2"),
        ("descend_without_noise", lambda rate, steps, **_: [3.0] * (steps + 1), "eta above 2"),
        ("descend_without_noise", lambda rate, steps, **_: [3.0] * (steps + 1), "limit cycle"),
        ("descend", lambda steps, **_: flat(steps), "Mean square errors"),
        ("descend", lambda steps, **_: flat(steps), "random walk"),
        ("descend", lambda steps, **_: flat(steps), "eta = 0.5 / t, with an infinite sum and a finite"),
        ("descend", lambda steps, **_: falling(steps), "with a finite sum, stops short"),
        ("descend", lambda steps, **_: falling(steps), "eta = 0.5, with an infinite sum of squares"),
    ],
)
def test_what_is_not_as_theory_has_it_does_not_hold(
    short: Callable[..., Config], function: str, found: Callable[..., Any], words: str
) -> None:
    (verdict,) = (v for bar, v in verdicts(outcome(short(), **{function: found})).items() if words in bar)
    assert verdict == "does not hold"


@pytest.mark.parametrize("words", ["stops short", "eta = 0.5, with an infinite sum of squares"])
@pytest.mark.parametrize("batch_size", SETTINGS.batch_sizes)
def test_what_falls_at_one_batch_size_alone_has_not_come_to_rest(
    short: Callable[..., Config], words: str, batch_size: int
) -> None:
    def falls_there(steps: int, **coordinates: Any) -> dict[str, list[float]]:
        return falling(steps) if coordinates["batch_size"] == batch_size else flat(steps)

    (verdict,) = (v for bar, v in verdicts(outcome(short(), descend=falls_there)).items() if words in bar)
    assert verdict == "does not hold"


def flat(steps: int) -> dict[str, list[float]]:
    return {"mean": [3.0] * len(counts(steps)), "square": [9.0] * len(counts(steps))}


def falling(steps: int) -> dict[str, list[float]]:
    return {"mean": [1 / t for t in counts(steps)], "square": [1 / t for t in counts(steps)]}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 16}, "study.steps=16 must be 32 or more"),
        ({"rate_steps": 8}, "study.rate_steps=8 must be 16 or more"),
        ({"scale": 1.0}, "study.scale=1.0 must be between 0 and 1"),
        ({"rates": [0.5]}, rf"study.rates=\[0.5\] must have {EDGE:g}"),
    ],
)
def test_wrong_settings_are_a_user_error(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        laboratory.load(dataclasses.replace(SETTINGS, **values))


def test_a_miniature_ends_with_report_and_figure(
    short: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = dataclasses.replace(SETTINGS, steps=32, rate_steps=16, powers=[0, 1], batch_sizes=[1], seeds=[0, 1])
    run_study(dataclasses.replace(short(), name="small", study=settings), tmp_path)
    assert "eta = 0.5 / t" in capsys.readouterr().out
    assert (tmp_path / "report.html").exists() and (tmp_path / "figure.png").exists()


def test_files_of_the_configuration_fit(short: Callable[..., Config]) -> None:
    full, cut = (short(f"experiment={name}") for name in ("one_dimensional", "short/one_dimensional"))
    for config in (full, cut):
        assert config.study is not None
        laboratory.load(config.study)
    assert full.directory != cut.directory
