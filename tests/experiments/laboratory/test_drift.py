import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import laboratory
from experiments.errors import UserError
from experiments.jobs import Job, Measurement, Result, Training
from experiments.laboratory.drift.analysis import crossing, losses, lowest, tuned, tuned_loss
from experiments.laboratory.drift.follow import lengths_of, scatter_of
from experiments.laboratory.drift.study import Drift
from experiments.laboratory.schemas import DriftConfig
from experiments.launch import run_study
from experiments.record import Record
from experiments.schemas.run import Config
from experiments.study import Outcome

pytestmark = pytest.mark.usefixtures("few_resamples")

SETTINGS = DriftConfig(
    name="drift",
    method="batch_invariant_adam",
    horizons=[16, 128, 1024],
    lr_multipliers=[0.5, 1, 2],
    phases=2,
    lengths=7,
    seeds=[0, 1, 2],
    workers=1,
)
LENGTHS = lengths_of(16, 7)
GROUPS = ("whole gradient", "in units of the noise", "layer 1: Linear", "layer 3: Linear")


def test_curves_meet_between_points() -> None:
    lengths = [16, 32, 64, 128]
    rising, falling = np.array([1.0, 2.0, 4.0, 8.0]), np.array([8.0, 4.0, 2.0, 1.0])
    assert crossing(lengths, rising, falling) == pytest.approx(32 * 2**0.5)
    assert crossing(lengths, rising, np.array([8.0, 4.0, 4.0, 1.0])) == 64


def test_curves_that_do_not_meet_are_at_the_end_where_they_are_closest() -> None:
    lengths = [16, 32, 64]
    rising = np.array([1.0, 2.0, 4.0])
    assert crossing(lengths, rising, rising[::-1] / 10) == 16
    assert crossing(lengths, rising, rising[::-1] * 10) == 64
    assert crossing(lengths, np.array([1.0, 2.0, np.nan]), np.array([8.0, 4.0, 1.0])) == 64


def test_the_lowest_point_is_that_of_a_parabola() -> None:
    octaves = np.arange(5)
    values = np.exp((octaves - 2.3) ** 2)
    assert lowest([16, 32, 64, 128, 256], values) == pytest.approx(16 * 2**2.3)
    assert lowest([16, 32, 64], np.array([1.0, 2.0, 3.0])) == 16
    assert lowest([16, 32, 64], np.array([3.0, 2.0, 1.0])) == 64


def test_each_horizon_has_the_lowest_loss_over_its_learning_rates() -> None:
    loss = np.array([[[3.0, 1.0], [2.0, 4.0]]])
    assert tuned(loss) == [1, 0]
    assert tuned_loss(loss) == pytest.approx([1.0, 2.0])


def followed(
    seed: int,
    speed: float = 1.0,
    slower: float = 4.0,
    noise: float = 16.0,
    layers: float = 1.0,
    spread: float = 1.0,
    signal: float = 1.0,
    bump: float = 0.0,
) -> dict[str, Any]:
    """Drift (n / 128)^2 speed, of which an average has a quarter; in the second phase it is slower. `layers` is the
    ratio of the drift of the two layers, `spread` the noise of averages over that of independent batches, `bump` what
    keeps the average away from the gradient where drift equals noise."""

    def phase(i: int, group: str) -> dict[str, Any]:
        n = np.array(LENGTHS, dtype=float)
        drift = speed * (1 + 1e-3 * seed) * 0.02 * (n / 128) ** 2 / (1.0 if i == 0 else slower)
        drift = drift * layers if group == GROUPS[3] else drift
        scatter = np.array([scatter_of(int(x), noise, 16) for x in n]) * spread
        return {
            "examples": [[100, 1000], [1000, 10_000]][i],
            "signal": signal,
            "noise": noise,
            "drift": drift.tolist(),
            "error": (drift / 2 + scatter + bump * (np.abs(drift - scatter) < scatter)).tolist(),
            "lag": (drift / 2).tolist(),
            "scatter": scatter.tolist(),
        }

    return {"loss": 0.1, "groups": {group: [phase(i, group) for i in range(2)] for group in GROUPS}}


def record(horizon: int, multiplier: float, seed: int, best: int = 128, status: Any = "finished") -> Record:
    loss = 0.1 * (1 + abs(np.log2(horizon / best)) / 10 + abs(np.log2(multiplier)) + 1e-3 * seed)
    return Record("ours", "ours", 0.01, 16, seed, "", status, [0, 256], [2.3, float(loss)], [2.3, 1.0], [0.1, 0.9])


def result(job: Job, best: int = 128, **changes: float) -> Result:
    c: Any = job.coordinates
    if isinstance(job, Training):
        return Result(c, record(c["horizon"], c["multiplier"], c["seed"], best), 1.0)
    return Result(c, followed(c["seed"], **changes), 1.0)


def outcome(config: Config, best: int = 128, **changes: float) -> Outcome:
    study = Drift(SETTINGS)
    first = [result(job, best) for job in study.jobs(config, [])]
    return study.outcome([result(job, best, **changes) for job in study.jobs(config, first)])


@pytest.fixture
def config(short: Callable[..., Config]) -> Config:
    return dataclasses.replace(short("model.dropout=0"), study=SETTINGS)


def verdict(of: Outcome, words: str) -> str | None:
    (found,) = (finding.verdict for finding in of.findings if words in finding.bar)
    return found


def test_runs_are_followed_at_the_tuned_learning_rate_of_their_horizon(config: Config) -> None:
    study = Drift(SETTINGS)
    first = study.jobs(config, [])
    assert len(first) == 3 * 3 * 3 and all(isinstance(job, Training) for job in first)
    more = [job for job in study.jobs(config, [result(job) for job in first]) if isinstance(job, Measurement)]
    assert len(more) == 3 * 3
    assert {job.coordinates["lr"] for job in more} == {config.optimizer.lr}
    assert {job.coordinates["examples"] for job in more} == {2816}
    again = study.jobs(config, [result(job) for job in [*first, *more]])
    assert {job.directory for job in again} == {job.directory for job in [*first, *more]}


def test_horizons_become_betas_at_the_tuned_batch_size(config: Config) -> None:
    betas = {
        job.coordinates["horizon"]: job.config.optimizer.betas  # type: ignore[attr-defined]
        for job in Drift(SETTINGS).jobs(config, [])
        if isinstance(job, Training)
    }
    assert betas == {n: (pytest.approx((1 - 1 / n) ** 16), 0.999) for n in SETTINGS.horizons}


def test_claims_hold_where_drift_is_slow_and_momentum_as_long_as_its_best_average(config: Config) -> None:
    of = outcome(config)
    judged = [finding for finding in of.findings if finding.verdict]
    assert len(judged) == 8
    assert {finding.verdict for finding in judged} == {"holds"}
    assert not any("at an edge" in finding.sentence for finding in of.findings)


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        ("drifts slowly", {"speed": 1000.0}),
        ("A running average helps", {"speed": 1000.0}),
        ("closer to the gradient than zero", {"signal": 1e-3}),
        ("as close to the gradient as any", {"bump": 1.0}),
        ("grows along training", {"slower": 0.25}),
        ("in all layers", {"layers": 40.0}),
        ("that of independent batches", {"spread": 0.5}),
        ("is that of the best momentum", {"best": 16}),
    ],
)
def test_claims_fail_where_they_should(config: Config, words: str, changes: dict[str, Any]) -> None:
    assert verdict(outcome(config, **changes), words) == "does not hold"


def test_a_horizon_at_an_end_of_what_was_measured_judges_nothing(config: Config) -> None:
    of = outcome(config, speed=1e-4)
    assert verdict(of, "as close to the gradient as any") == "cannot be judged"
    assert verdict(of, "is that of the best momentum") == "cannot be judged"


def test_momentum_is_compared_with_the_end_of_training(config: Config) -> None:
    (finding,) = (f for f in outcome(config).findings if "is that of the best momentum" in f.bar)
    told = re.search(r"drift equals noise at N = ([\d.]+)", finding.sentence)
    # 0.02 / 4 (N / 128)^2 = 16 / (2 N)
    assert told and float(told[1]) == pytest.approx((8 * 128**2 * 4 / 0.02) ** (1 / 3), rel=0.03)


def test_edges_of_the_grids_are_noted(config: Config) -> None:
    sentences = [finding.sentence for finding in outcome(config, best=1024).findings]
    assert any("The best horizon, 1024, lies at an edge" in sentence for sentence in sentences)


def test_a_best_horizon_at_the_edge_of_the_grid_is_not_the_predicted_one(config: Config) -> None:
    of = outcome(config, best=1024, speed=0.05)  # drift equals noise at N = 806
    assert verdict(of, "is that of the best momentum") == "cannot be judged"


def test_a_diverged_run_has_the_loss_of_its_start() -> None:
    results = [
        Result({"seed": 0, "horizon": n, "multiplier": 1.0}, record(n, 1.0, 0, status=status), 1.0)
        for n, status in ((16, "finished"), (128, "diverged"))
    ]
    assert losses(results).values[0, :, 0] == pytest.approx([0.13, 2.3])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.dropout=0.5"], "model.dropout must be 0 here"),
        (["model.dropout=0", "train.decay=cosine"], "train.decay must be none"),
        (["model.dropout=0", "train.max_norm=1"], "train.max_norm null"),
    ],
)
def test_what_cannot_be_followed_is_a_user_error(
    short: Callable[..., Config], overrides: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        Drift(SETTINGS).jobs(short(*overrides), [])


@pytest.mark.parametrize("values", [{"phases": 1}, {"lengths": 2}])
def test_wrong_settings_are_a_user_error(values: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="study.phases=. must be 2 or more, and study.lengths=. 3 or more"):
        laboratory.load(dataclasses.replace(SETTINGS, **values))


def test_a_miniature_ends_with_report_and_figure(
    short: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = short("model.dropout=0", "model.widths=[8]", "train.epochs=0.4", "evaluation.count=2")
    settings = dataclasses.replace(SETTINGS, horizons=[16, 64], lr_multipliers=[1], lengths=3, seeds=[0, 1])
    run_study(dataclasses.replace(config, name="small", study=settings), tmp_path)
    out = capsys.readouterr().out
    assert "4 jobs" in out and "8 jobs, 4 of them finished before" in out and "Momentum of each horizon" in out
    assert (tmp_path / "report.html").exists() and (tmp_path / "figure.png").exists()


def test_files_of_the_configuration_fit(short: Callable[..., Config], tmp_path: Path) -> None:
    full, cut = (short(f"experiment={name}") for name in ("drift", "short/drift"))
    for config in (full, cut):
        assert config.study is not None
        laboratory.load(config.study).jobs(dataclasses.replace(config, directory=str(tmp_path)), [])
    assert full.directory != cut.directory
