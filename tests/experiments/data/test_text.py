from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.data import Dataset, load_data
from experiments.data.text import announce
from experiments.errors import UserError
from experiments.schemas.data import FileTextConfig, TextConfig

CPU = torch.device("cpu")
TEXT = "".join(chr(ord("a") + i * i % 26) for i in range(400)) + "é€"


def own(file: Path, **changes: Any) -> FileTextConfig:
    file.write_text(TEXT, encoding="utf-8")
    options = {"context": 8, "evaluated": 1000, "limit": None, "test_fraction": 0.25, "sha256": None}
    return FileTextConfig("text", **(options | {"path": str(file), "url": None, "cache": str(file.parent)} | changes))


def spelt(tokens: torch.Tensor) -> list[str]:
    return ["".join(sorted(set(TEXT))[token] for token in row) for row in tokens.tolist()]


@pytest.fixture
def data(tmp_path: Path) -> Dataset:
    return load_data(own(tmp_path / "own.txt"), CPU)


def test_targets_are_the_next_characters_and_sets_follow_one_another(data: Dataset) -> None:
    border = 402 - 1 - 100
    expected = {data.train: TEXT[: border + 1], data.test: TEXT[border:]}
    for split, text in expected.items():
        assert spelt(split.x) == [text[i : i + 8] for i in range(0, len(text) - 8, 8)]
        assert spelt(split.y) == [text[i + 1 : i + 9] for i in range(0, len(text) - 8, 8)]
        assert split.x.dtype == split.y.dtype == torch.int64 and not split.mapped
    assert (len(data.train), len(data.test), data.shape) == (37, 12, (8,))


def test_characters_are_those_of_the_whole_text(data: Dataset) -> None:
    assert data.vocabulary == "".join(sorted(set(TEXT))) and data.classes == len(data.vocabulary) and data.discrete
    assert data.train.x.max() < data.classes - 2  # letters alone, and two other characters in the test set
    assert data.sha256 == hashlib.sha256(TEXT.encode()).hexdigest()


def test_limit_counts_sequences_before_the_split(tmp_path: Path) -> None:
    data = load_data(own(tmp_path / "own.txt", limit=40), CPU)
    assert (len(data.train), len(data.test)) == (30, 10)
    assert spelt(data.test.x)[0] == TEXT[240:248]


def test_losses_are_measured_on_sequences_from_the_whole_set(tmp_path: Path) -> None:
    data = load_data(own(tmp_path / "own.txt", evaluated=6), CPU)
    chosen = [0, 7, 14, 22, 29, 36]  # to the nearest
    assert torch.equal(data.evaluated.x, data.train.x[chosen]) and torch.equal(data.evaluated.y, data.train.y[chosen])
    assert (len(data.train), len(data.test)) == (37, 6)


def test_the_help_texts_of_python(capsys: pytest.CaptureFixture[str]) -> None:
    announce.cache_clear()
    config = TextConfig("topics", 32, 1024, 10240, 0.2, None)
    data, again = load_data(config, CPU), load_data(config, CPU)
    assert (len(data.train), len(data.evaluated), len(data.test), data.shape) == (8192, 1024, 1024, (32,))
    assert data.sha256 == again.sha256 and torch.equal(data.train.x, again.train.x)
    err = capsys.readouterr().err
    assert err.count("data=topics: 327,681 characters") == 1 and f"sha256 {data.sha256}" in err
    with pytest.raises(UserError, match=f"data=topics has sha256 {data.sha256}, and data.sha256=0123: one of them"):
        load_data(TextConfig("topics", 32, 1024, 10240, 0.2, "0123"), CPU)


REFUSED = {
    "no text": ({"path": None}, "data=text needs a text: give data.path=FILE, or data.url=URL with data.sha256"),
    "no checksum": ({"path": None, "url": "http://127.0.0.1:9/"}, "data.url=URL with data.sha256=CHECKSUM"),
    "two texts": ({"url": "http://127.0.0.1:9/", "sha256": "0123"}, "give data.path=FILE, or data.url=URL"),
    "missing": ({"path": "nowhere.txt"}, "data.path=nowhere.txt cannot be read: No such file"),
    "checksum": ({"sha256": "0123"}, r"sha256 [0-9a-f]{64}, and data.sha256=0123: one of them"),
    "short": ({"context": 101}, "402 characters are too few for data.context=101"),
    "fraction": ({"test_fraction": 1.0}, "data.test_fraction=1.0 must be between 0 and 1"),
    "context": ({"context": 0}, "data.context=0 must be positive"),
    "limit": ({"limit": -1}, "data.limit=-1 must be positive"),
    "evaluated": ({"evaluated": 0}, "data.evaluated=0 must be positive"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_configurations_are_named(tmp_path: Path, case: str) -> None:
    changes, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        load_data(own(tmp_path / "own.txt", **changes), CPU)


def test_the_longest_context_that_fits(tmp_path: Path) -> None:
    data = load_data(own(tmp_path / "own.txt", context=100), CPU)
    assert (len(data.train), len(data.test)) == (3, 1)


def test_other_encodings_are_named(tmp_path: Path) -> None:
    config = own(tmp_path / "own.txt")
    (tmp_path / "own.txt").write_bytes("é".encode("latin-1") * 100)
    with pytest.raises(UserError, match="the text of data=text is not UTF-8"):
        load_data(config, CPU)
