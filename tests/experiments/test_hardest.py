"""The hardest examples: against a gradient at a time, and with one that nobody could learn."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from experiments import hardest as module
from experiments.data import Dataset, Split, load_data
from experiments.hardest import COLUMNS, depict, hardest, hardness, show_hardest, spell
from experiments.models import build_model
from experiments.schemas.run import Config
from experiments.tracker import Cell, Picture, Tracker

CPU = torch.device("cpu")


class Kept(Tracker):
    def __init__(self) -> None:
        self.tables: dict[str, list[list[Cell]]] = {}

    def table(self, name: str, columns: object, rows: object) -> None:
        self.tables[name] = rows  # type: ignore[assignment]


@pytest.fixture
def digits(short: Callable[..., Config]) -> Dataset:
    data = load_data(short().data, CPU)
    return Dataset(Split(data.train.x[:40], data.train.y[:40]), data.test, data.classes)


def a_model(short: Callable[..., Config], data: Dataset, *overrides: str) -> nn.Module:
    return build_model(short(*overrides).model, data.shape, data.classes)


def one_by_one(model: nn.Module, split: Split) -> list[float]:
    norms = []
    for x, y in zip(split.x, split.y, strict=True):
        loss = F.cross_entropy(model(x[None]).flatten(0, -2), y[None].flatten())
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        norms.append(torch.cat([g.flatten() for g in gradients]).norm().item())
    return norms


@pytest.mark.parametrize("overrides", [["model=mlp"], ["model=mlp", "model.dropout=0.5"], ["model=convnet"]])
def test_norms_are_those_of_single_gradients(
    overrides: list[str], short: Callable[..., Config], digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without dropout's masks; over chunks, the last of them shorter."""
    monkeypatch.setattr(module, "CHUNK", 16)
    model = a_model(short, digits, *overrides)
    found = hardness(model, digits.train)
    assert model.training and all(p.grad is None for p in model.parameters())
    expected = one_by_one(model.eval(), digits.train)
    assert found.norm.tolist() == pytest.approx(expected, rel=1e-4)
    assert found.index.tolist() == list(range(40))
    logits = model(digits.train.x)
    assert torch.allclose(found.loss, F.cross_entropy(logits, digits.train.y, reduction="none"), rtol=1e-5)
    assert torch.equal(found.predicted, logits.argmax(1))


def test_text_counts_by_the_sequence(short: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_TARGETS", 12)  # two sequences
    x = torch.randint(3, (6, 5))
    split = Split(x, x.roll(-1, 1))
    data = Dataset(split, split, classes=3, vocabulary="abc")
    model = build_model(short("model=gpt").model, data.shape, data.classes, data.discrete)
    found = hardness(model, split)
    assert found.norm.tolist() == pytest.approx(one_by_one(model, split), rel=1e-4)
    assert found.predicted.shape == (6, 5)
    losses = F.cross_entropy(model(x).transpose(1, 2), split.y, reduction="none").mean(1)
    assert torch.allclose(found.loss, losses, rtol=1e-5)
    (row, *_) = hardest(model, data)
    cells = dict(zip(COLUMNS, row, strict=True))
    index = found.norm.argmax()
    assert cells["index"] == index and cells["picture"] == "".join("abc"[i] for i in x[index])
    assert cells["label"] == "".join("abc"[i] for i in split.y[index])


def test_a_wrong_label_comes_first(short: Callable[..., Config], digits: Dataset) -> None:
    model = a_model(short, digits)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(model(digits.train.x), digits.train.y).backward()
        optimizer.step()
    optimizer.zero_grad()
    right = int(digits.train.y[7])
    digits.train.y[7] = (right + 1) % 10
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in hardest(model, digits, count=5)]
    assert [row["rank"] for row in rows] == [1, 2, 3, 4, 5]
    norms = [row["gradient norm"] for row in rows]
    assert norms == sorted(norms, reverse=True)
    assert (rows[0]["index"], rows[0]["label"], rows[0]["predicted"]) == (7, (right + 1) % 10, right)


def test_of_a_large_set_a_part_is_looked_at(
    short: Callable[..., Config], digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_TARGETS", 15)
    found = hardness(a_model(short, digits), digits.train)
    assert found.index.tolist() == list(range(0, 40, 3))
    (row,) = hardest(a_model(short, digits), digits, count=1)
    index = dict(zip(COLUMNS, row, strict=True))["index"]
    assert isinstance(index, int) and index % 3 == 0


def test_pictures_and_other_cells() -> None:
    grey = torch.tensor([[[-1.0, 0.0], [0.5, 1.0]]])
    picture = depict(grey, None)
    assert isinstance(picture, Picture)
    assert picture.pixels.shape == (64, 64) and picture.pixels.dtype == np.uint8
    assert picture.pixels[[0, 0, -1, -1], [0, -1, 0, -1]].tolist() == [0, 128, 191, 255]
    colour = torch.zeros(3, 80, 100)
    colour[0] = 1
    picture = depict(colour, None)
    assert isinstance(picture, Picture)
    assert picture.pixels.shape == (80, 100, 3) and picture.pixels[0, 0].tolist() == [255, 0, 0]
    assert isinstance(depict(torch.zeros(1, 8, 8), None), Picture)  # all one value
    assert depict(torch.tensor([0.5, -1.25]), None) == "0.5, -1.25"
    assert spell(torch.tensor(3), None) == 3
    assert spell(torch.tensor([1, 0]), None) == "1 0" and spell(torch.tensor([1, 0]), "ab") == "ba"


def test_a_failure_is_told_and_stops_nothing(
    short: Callable[..., Config], digits: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    coupled = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 10))
    show_hardest(coupled, digits, kept := Kept())
    assert kept.tables["hardest examples"], "without batch statistics, in evaluation mode, there is nothing to refuse"
    broken = nn.Sequential(nn.Flatten(), nn.Linear(3, 10))
    show_hardest(broken, digits, kept := Kept())
    assert not kept.tables
    assert "the hardest examples could not be found: " in capsys.readouterr().err
