"""A short run on the digits, and the entry point as a user meets it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from experiments import estimate
from experiments.config import compose_config
from experiments.schemas.run import Config
from experiments.train import main

# 2,816 examples: two epochs, so that a batch crosses the end of an epoch.
SHORT = ["tracker=none", "train.epochs=2", "train.warmup_examples=256", "evaluation.count=5"]


@pytest.fixture
def short() -> Callable[..., Config]:
    """A configuration from overrides on top of a run of a fraction of a second."""
    return lambda *overrides: compose_config([*SHORT, *overrides])


@pytest.fixture
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Intervals sooner."""
    monkeypatch.setattr(estimate, "DRAWS", 40)
    estimate.resamples.cache_clear()
    yield
    # They are kept: without this, later tests in the process would have few too.
    estimate.resamples.cache_clear()


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture
def launch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., Outcome]:
    """`python -m experiments.train` within this process, in an empty directory."""
    monkeypatch.chdir(tmp_path)

    def run(*overrides: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["experiments.train", *SHORT, *overrides])
        try:
            main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run
