"""`python -m experiments.tune`, as a user meets it."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import gradstats
from experiments import tune
from experiments.capacity import step_memory
from experiments.config import compose_config
from experiments.data import load_data
from experiments.schemas.optimizer import AdamConfig, BatchInvariantAdamConfig
from experiments.tune_report import as_torch, regrets, settings
from gradstats.optim import BatchInvariantAdam
from tests.experiments.conftest import Outcome

TINY = [
    *("tracker=none", "train.epochs=0.8", "train.warmup_examples=64", "evaluation.count=2", "evaluation.multiple=64"),
    *("tune.seeds=[0,1]", "tune.factor=4", "tune.workers=1", "tune.memory_gb=0.001", "directory=tuned"),
]

Launch = Callable[..., Outcome]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Launch:
    monkeypatch.chdir(tmp_path)

    def run(*overrides: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["experiments.tune", *TINY, *overrides])
        try:
            tune.main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


def test_it_tunes_measures_and_tells_and_runs_nothing_twice(launched: Launch) -> None:
    first = launched()
    assert first.code == 0, first.err
    text = Path("tuned/tuned.md").read_text()
    for expected in (
        r"Tuned at B = 16: lr [\d.]+ \[[\d.]+, [\d.]+\], where the training loss after 0.8 epochs is lowest",
        r"Largest batch: B = 512. .* measured on the cpu, of 1 MB that they may; 1024 was tried, and takes more",
        r"BatchInvariantAdam\(model.parameters\(\), lr=[\d.]+, betas=\(0.99, 0.999\), eps=1e-08, batch_size=16\)",
        r"torch.optim.AdamW\(model.parameters\(\), lr=",
        r"\| \*\*ours, tuned at B = 16\*\* \|",
        r"Expected regret of ours, tuned at B = 16, at B = 64: \S+ \[\S+, \S+\] on the training loss, \S+ \[",
        r"Regret at B = 512 was not measured: a run has 2 steps there",
        r"Measured with: python 3",
    ):
        assert re.search(expected, text), expected
    assert "train.batch_size=512 evaluation.multiple=512 optimizer=batch_invariant_adam" in text
    assert "Expected regret of ours" in first.out and "tuned/tuned.md" in first.out
    again = launched()
    rounds = [(int(a), int(b)) for a, b in re.findall(r"(\d+) jobs, (\d+) of them finished", again.out)]
    assert rounds and all(jobs == before for jobs, before in rounds)
    assert Path("tuned/tuned.md").read_text() == text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer=adam"], "optimizer=adam: what is tuned is optimizer=batch_invariant_adam"),
        (["tune.seeds=[0]"], "an interval needs two seeds"),
        (["tune.seeds=[0,0]"], r"tune.seeds: \[0, 0\] must have one value or more, each of them once"),
        (["tune.share=0"], "tune.share=0.0 is a share"),
        (["tune.factor=0"], "tune.factor=0 must be positive"),
        (["tune.horizons=[0.001]"], r"tune.horizons=\[0.001\]: with optimizer.betas=.* each must be 0.01 or more"),
        (["tune.memory_gb=1e-6"], "raise tune.memory_gb"),
        (["tune.batchsize=4"], "batchsize"),
        (["train.epochs=0.1"], "train.epochs"),
    ],
)
def test_what_is_wrong_is_one_message(launched: Launch, overrides: list[str], message: str) -> None:
    found = launched(*overrides)
    assert found.code != 0 and re.search(message, found.err) and "Traceback" not in found.err
    assert not Path("tuned/tuned.md").exists()


def test_where_nothing_larger_fits_regret_is_not_told(launched: Launch) -> None:
    assert launched(room_for(16)).code == 0
    text = Path("tuned/tuned.md").read_text()
    assert "Largest batch: B = 16." in text and "none above 16 fits" in text and "Expected regret" not in text


def test_regret_is_told_at_the_largest_batch_too(launched: Launch) -> None:
    assert launched("tune.factor=2", room_for(64)).code == 0
    text = Path("tuned/tuned.md").read_text()
    told = re.findall(r"Expected regret of (\w+), .*?, at B = (\d+):", text)
    assert told == [("ours", "32"), ("AdamW", "32"), ("ours", "64"), ("AdamW", "64")]
    assert "Regret at B = 32" in text and "Regret at B = 64" in text and "not measured" not in text


def room_for(batch_size: int) -> str:
    """An override: the memory of a step of so many examples, and half of what twice as many add."""
    config = compose_config([override for override in TINY if not override.startswith("tune.")])
    cpu = torch.device("cpu")
    data = load_data(config.data, cpu)
    fits, does_not = (step_memory(config, data, cpu, size) for size in (batch_size, 2 * batch_size))
    return f"tune.memory_gb={(fits + does_not) / 2e9}"


def ours(**values: object) -> BatchInvariantAdamConfig:
    optimizer = compose_config([]).optimizer
    assert isinstance(optimizer, BatchInvariantAdamConfig)
    for name, value in ({"lr": 0.0123, "betas": (0.95, 0.99)} | values).items():
        setattr(optimizer, name, value)
    return optimizer


@pytest.mark.parametrize("changed", [{}, {"reference_batch_size": 4.0, "denominator": "slides", "eps": 1e-3}])
def test_what_is_printed_can_be_pasted(changed: dict[str, object]) -> None:
    code, *_ = settings(ours(**changed), 128, 256, [])
    first, second = re.findall(r"```python\n(.*?)```", code, re.DOTALL)
    namespace = {"model": torch.nn.Linear(2, 2), "torch": torch, "gradstats": gradstats}
    exec(first, namespace | {"BatchInvariantAdam": BatchInvariantAdam}, namespace)
    optimizer = namespace["optimizer"]
    assert isinstance(optimizer, BatchInvariantAdam)
    expected = {"lr": 0.0123, "betas": (0.95, 0.99), "eps": 1e-8, "batch_size": 16, "reference_batch_size": None}
    assert (expected | changed).items() <= optimizer.param_groups[0].items()

    exec(second, namespace)
    group = namespace["optimizer"].param_groups[0]  # type: ignore[attr-defined]
    converted = gradstats.optim.to_torch(optimizer, 128).param_groups[0]
    for name in ("lr", "betas", "eps", "weight_decay"):
        assert group[name] == pytest.approx(converted[name], rel=1e-3)


def test_the_commands_run_the_same_optimizers() -> None:
    for changed in ({}, {"reference_batch_size": 4.0}):
        _, commands, *_ = settings(ours(**changed), 128, 64, ["experiment=digits", "tune.factor=2", "optimizer.eps=1"])
        first, second = (shlex.split(line)[3:] for line in commands.splitlines()[1:-1])
        assert "experiment=digits" in first and "tune.factor=2" not in first and "optimizer.eps=1" not in first
        config = compose_config(first)
        assert config.optimizer == ours(**changed, betas=[0.95, 0.99]) and config.train.batch_size == 128
        assert config.evaluation.multiple == 128
        found, expected = compose_config(second).optimizer, as_torch(ours(**changed), 128)
        assert isinstance(found, AdamConfig) and found.batch_size == 128
        assert (found.lr, *found.betas, found.eps) == pytest.approx(
            (expected.lr, *expected.betas, expected.eps), rel=1e-3
        )


def test_a_batch_beyond_the_horizon_is_warned_of() -> None:
    assert "longer than the 320 examples" in settings(ours(), 512, 512, [])[-1]
    assert "longer than" not in "".join(settings(ours(), 256, 512, []))


def test_regret_is_to_the_best_learning_rate_of_the_training_loss() -> None:
    seeds = np.array([0.0, 0.1, 0.2])[:, None]
    losses = np.array([[0.5, 2.0]]) + seeds
    reference = np.array([[[0.4, 3.0], [0.3, 1.0], [0.9, 0.0]]]) + seeds[..., None]
    training, held_out = regrets(losses, reference)
    assert (training.value, held_out.value) == pytest.approx((0.2, 1.0))
    assert (training.low, training.high) == pytest.approx((0.2, 0.2))  # paired seeds
    better, _ = regrets(losses - 0.4, reference)
    assert better.value == pytest.approx(-0.2)
