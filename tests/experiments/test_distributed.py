"""Processes that share a run: the same learning curve, one directory, one message, and nothing lost between them."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from experiments import checkpoint, history
from experiments.record import Record
from tests.experiments import ranks
from tests.experiments.conftest import SHORT
from tests.experiments.ranks import Ranks, alone, train_exactly
from tests.experiments.runs import numbers, parameters

UNEVEN = ["train.batch_size=15", "evaluation.multiple=255"]  # 7 and 8 of each batch


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    with ranks.started(2) as started:
        yield started


@pytest.fixture(scope="module")
def four() -> Iterator[Ranks]:
    with ranks.started(4) as started:
        yield started


def same_curve(found: Record, expected: Record) -> None:
    for name in ("train_loss", "test_loss", "test_accuracy"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-9), name
    unequal = {"train_loss": [], "test_loss": [], "test_accuracy": []}
    assert numbers(dataclasses.replace(found, **unequal)) == numbers(dataclasses.replace(expected, **unequal))


CURVES = {
    "adam": ["optimizer=adam"],
    "clipped": ["optimizer=sgd_linear", "train.max_norm=0.1"],
    "uneven": ["optimizer=adam", *UNEVEN],
}


@pytest.mark.parametrize("case", CURVES)
def test_two_processes_have_the_learning_curve_of_one(case: str, two: Ranks, tmp_path: Path) -> None:
    """Dropout included: a mask belongs to the position in the stream of examples, whoever draws it."""
    overrides = [*SHORT, *CURVES[case]]
    first, second = two(train_exactly, overrides, tmp_path / "two")
    assert numbers(first) == numbers(second)
    same_curve(first, alone(overrides, tmp_path / "one"))
    torch.testing.assert_close(parameters(tmp_path / "two"), parameters(tmp_path / "one"), rtol=1e-9, atol=1e-12)
    one, other = ([set(line) for line in history.load(tmp_path / name)] for name in ("one", "two"))
    assert one == other


def test_another_number_of_processes_continues(two: Ranks, tmp_path: Path) -> None:
    overrides = [*SHORT, "optimizer=adam", "resume=true", "train.checkpoint_every_examples=1408"]
    whole = {"one": alone(overrides, tmp_path / "one"), "two": two(train_exactly, overrides, tmp_path / "two")[0]}
    for name in whole:
        (tmp_path / f"{name} continued").mkdir()
        shutil.copy(tmp_path / name / checkpoint.PREVIOUS, tmp_path / f"{name} continued" / checkpoint.FILE)
    same_curve(alone(overrides, tmp_path / "two continued"), whole["two"])
    same_curve(two(train_exactly, overrides, tmp_path / "one continued")[0], whole["one"])
