import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import laboratory
from experiments.config import compose_config
from experiments.errors import UserError
from experiments.grid import arrange
from experiments.invariance.analysis import scores
from experiments.jobs import Job, Measurement, Result, Training
from experiments.laboratory.quadratic import stationary_variance
from experiments.laboratory.schemas import SGDMomentumConfig
from experiments.laboratory.sgd_momentum.analysis import analyse
from experiments.laboratory.sgd_momentum.noisy_quadratic import descend, difference, momentum_of
from experiments.laboratory.sgd_momentum.study import SGDMomentum
from experiments.launch import run_study
from experiments.record import Record
from experiments.schemas.run import Config
from experiments.study import Outcome
from experiments.themes import DARK
from tests.experiments.conftest import SHORT

SETTINGS = SGDMomentumConfig(
    name="sgd_momentum",
    lr=0.002,  # of which a batch of 64 makes no step that would show in the variance
    horizon=20,
    time_constants=4,
    replicas=4,
    informative=[0.25, 1],
    tuning_batch_size=16,
    batch_sizes=[16, 64],
    lr_multipliers=[0.5, 1.0],
    lr_fractions=[1, 0.5],
    seeds=[0, 1],
    workers=1,
)
FAILING = {
    "difference": 1e-3,
    "theory": 1.5,
    "time": 0.5,
    "variance": -0.5,
    "rate": 1.2,
    "effect": 0.01,
    "slow": 0.5,
    "memory": -0.5,
    "other": 0.1,
    "ours": 1.0,
    "debiased": 0.5,
}
COUNTS = [0, *range(256, 4097, 256)]


@pytest.fixture(scope="module")
def config() -> Config:
    composed = compose_config([*SHORT, "train.epochs=0.5", "train.warmup_examples=0"])
    return dataclasses.replace(composed, name="small", study=SETTINGS)


def found(job: Job, changes: dict[str, float], random: np.random.Generator) -> Any:
    """As the sources have it, to a thousandth; `changes` by the name of a number."""
    c = job.coordinates
    blur = 1 + 1e-3 * random.normal()
    if isinstance(job, Training):
        return trained(job, changes, blur)
    assert isinstance(job, Measurement)
    if job.function is difference:
        return changes.get("difference", 1e-15)
    if job.function is not descend:
        effect = [1.0 + (changes.get("effect", 0.0) if c["method"] == "heavy_ball" else 0.0)] * 4
        return {"examples": [0, 16, 32, 48], "effect": effect}
    size, share, method = float(c["batch_size"]), float(c["informative"]), str(c["method"])  # type: ignore[arg-type]
    tuned = 16 if method == "torch" else size
    relative = size / tuned
    constant = relative / SETTINGS.lr / share
    examples = np.linspace(0, 8 * constant, 201)
    constant /= share ** changes.get("slow", 0.0)
    if method == "heavy_ball":
        constant *= (size / 16) ** changes.get("time", 0.0)
    if method == "debiased_ewma":
        constant *= changes.get("rate", 1.0)
    momentum = momentum_of(SETTINGS.horizon, int(tuned))
    variance = stationary_variance(tuned * SETTINGS.lr * (1 - momentum), 1 / size, momentum=momentum)
    variance *= (size / 16) ** changes.get("variance", 0.0) if method == "heavy_ball" else 1
    return {
        "examples": examples.tolist(),
        "mean": np.exp(-examples / constant * blur).tolist(),
        "variance": variance * blur * changes.get("theory", 1.0),
        "of_average": blur * share ** (1 + changes.get("memory", 0.0)) / 39 if method == "ewma" else None,
    }


def trained(job: Training, changes: dict[str, float], blur: float) -> Record:
    """A power law, which moves with ln(B / 16) by the sensitivity of the scaling."""
    c, run = job.coordinates, job.config
    scaling = c.get("scaling")
    sensitivity = {"fixed": 0.5, "linear": 0.2, "ours": changes.get("ours", 0.01)}.get(str(scaling), 0.01)
    moved = sensitivity * np.log(run.train.batch_size / 16)
    if scaling == "ours_debiased":
        moved += changes.get("debiased", 0.0)
    if scaling == "ours":
        moved += changes.get("other", 1e-7)
    moved += 0.1 * abs(np.log(run.optimizer.lr / 2.5e-2)) + 0.05 * run.seed
    losses = [2.3 * (1 + n / 256) ** -1.0 * float(np.exp(moved if n else 0)) for n in COUNTS]
    record = Record(run.optimizer.name, "", run.optimizer.lr, run.train.batch_size, run.seed, "", "finished")
    return dataclasses.replace(record, examples=COUNTS, train_loss=losses, test_loss=losses, test_accuracy=losses)


def results(config: Config, changes: dict[str, float]) -> list[Result]:
    study, random = SGDMomentum(SETTINGS), np.random.default_rng(0)
    known: list[Result] = []
    for _ in range(2):
        known = [Result(job.coordinates, found(job, changes, random), 1.0) for job in study.jobs(config, known)]
    return known


@pytest.fixture(scope="module")
def holding(config: Config) -> Outcome:
    return SGDMomentum(SETTINGS).outcome(results(config, {}))


@pytest.fixture(scope="module")
def failing(config: Config) -> Outcome:
    """All that can fail at once."""
    return SGDMomentum(SETTINGS).outcome(results(config, FAILING))


def verdicts(of: Outcome, words: str) -> set[str | None]:
    return {finding.verdict for finding in of.findings if words in finding.bar}


@pytest.mark.parametrize(
    "words",
    [
        "SGD along a running average",
        "is that of the theory",
        "the time to converge does not depend",
        "the variance that SGD settles at does not depend",
        "ours, debiased changes only the warm-up",
        "moves the parameters by lr0 g in total",
        "near-zero gradients come between",
        "forgets informative ones all the same",
        "is torch's momentum at the batch size",
        "with torch, lr fixed",
        "with torch, lr ~ B",
        "debiasing changes only the warm-up",
    ],
)
def test_claims_are_judged_both_ways(holding: Outcome, failing: Outcome, words: str) -> None:
    assert verdicts(holding, words) == {"holds"}
    assert verdicts(failing, words) == {"does not hold"}


def test_other_data_is_not_called_the_digits(config: Config) -> None:
    other = dataclasses.replace(config, data=dataclasses.replace(config.data, name="npz"))
    with pytest.raises(UserError, match="data=npz: what sgd_momentum says is of the digits"):
        SGDMomentum(SETTINGS).jobs(other, [])


def test_the_second_round_is_at_the_tuned_lr(config: Config) -> None:
    study = SGDMomentum(SETTINGS)
    first = study.jobs(config, [])
    known = [Result(job.coordinates, found(job, {}, np.random.default_rng(0)), 1.0) for job in first]
    second = study.jobs(config, known)[len(first) :]
    runs = [(job.coordinates["scaling"], job.config) for job in second if isinstance(job, Training)]
    assert len(runs) == len(second) == 4 * 2 * 2 * 2
    for scaling, run in runs:
        assert run.optimizer.lr in (2.5e-2, 1.25e-2)
        assert run.optimizer.batch_size == (run.train.batch_size if scaling == "fixed" else 16)
    assert {job.directory for job in second} & {job.directory for job in first}  # ours at home is known already


def test_the_score_is_that_of_batch_size_invariance(config: Config) -> None:
    found = results(config, {})
    analysis = analyse(SETTINGS, found)
    records = [
        r.found
        for r in found
        if (r.coordinates.get("stage"), r.coordinates.get("scaling"), r.coordinates.get("fraction"))
        == ("comparison", "fixed", 1)
    ]
    # There no loss counts for more than the initial one.
    assert analysis.score("fixed", 1).mean() == pytest.approx(scores(arrange(records), [16, 64])[0, 0], rel=0.01)
    assert np.isnan(analysis.score("fixed", 1, slice(0, 1))).all()


def test_a_diverged_run_counts_with_its_initial_loss(config: Config) -> None:
    known = results(config, {})
    broken = next(r.found for r in known if r.coordinates.get("scaling") == "fixed" and r.found.batch_size == 64)
    broken.status, broken.examples, broken.train_loss = "diverged", COUNTS[:3], broken.train_loss[:3]
    row = SGDMomentum(SETTINGS).outcome(known).tables[2].rows[0]
    assert row[0] == "torch, lr fixed" and row[4].high > 2.3  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tuning_batch_size": 4}, "must be two or more, and have study.tuning_batch_size=4 among them"),
        ({"informative": [1, 0.25]}, "the last of them 1"),
        ({"batch_sizes": [64, 16]}, "study.batch_sizes=.* ascending"),
        ({"lr": 0.1}, "study.lr=0.1 at B = 64 is a step beyond the minimum"),
    ],
)
def test_wrong_settings_are_a_user_error(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        laboratory.load(dataclasses.replace(SETTINGS, **values))


def test_the_figure_is_drawn_in_the_dark_too(holding: Outcome) -> None:
    figure = holding.draw(DARK)
    titles = [axes.get_title(loc="left") for part in figure.subfigs for axes in part.axes]
    assert len(titles) == 2 + 3 + 4 and "Near-zero gradients" in titles


@pytest.mark.slow
def test_a_miniature_ends_with_report_and_figure(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_study(config, tmp_path)
    out = capsys.readouterr().out
    assert "torch's momentum with lr = B lr0 / N_g is SGD along a running average: holds" in " ".join(out.split())
    assert (tmp_path / "report.html").exists() and (tmp_path / "figure.png").exists()


def test_files_of_the_configuration_fit() -> None:
    full, cut = (compose_config([f"experiment={name}"]) for name in ("sgd_momentum", "short/sgd_momentum"))
    for config in (full, cut):
        assert config.study is not None
        laboratory.load(config.study)
        assert config.train.warmup_examples == 0
    assert full.directory != cut.directory
