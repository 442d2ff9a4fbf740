"""With a stand-in for OpenML: nothing leaves the machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest

from experiments.config import compose_config
from experiments.data import openml
from experiments.data.openml import SOURCES, Source, read_openml
from experiments.errors import UserError

SMALL = Source(7, (1, 2, 3), 12, ("0123456789", "2345678901"))
X = np.arange(24.0 * 6).reshape(24, 6)
Y = np.array([str(i % 10) for i in range(24)])


class OpenML:
    """Gives the arrays, or raises the error; counts the times it is asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[dict[str, Any]] = []
        self.error: Exception | None = None
        self.y = Y
        monkeypatch.setattr(openml, "fetch_openml", self)

    def __call__(self, **options: Any) -> tuple[np.ndarray, np.ndarray]:
        self.asked.append(options)
        if self.error is not None:
            raise self.error
        return X, self.y


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> OpenML:
    return OpenML(monkeypatch)


def test_images_are_fetched_once_and_split_as_the_original(tmp_path: Path, network: OpenML) -> None:
    for _ in range(2):
        (x_train, y_train), (x_test, y_test) = read_openml("small", SMALL, tmp_path / "cache")
        assert np.array_equal(np.concatenate([x_train, x_test]), X.reshape(24, 1, 2, 3))
        assert np.concatenate([y_train, y_test]).tolist() == [i % 10 for i in range(24)]
        assert (len(x_train), len(x_test), y_train.dtype) == (12, 12, np.int64)
    (options,) = network.asked
    assert options["data_id"] == 7 and options["data_home"] == str(tmp_path / "cache")


@pytest.mark.parametrize("error", [URLError("no route to host"), ValueError("md5 checksum does not match"), OSError()])
def test_a_missing_network_names_the_way_out(tmp_path: Path, network: OpenML, error: Exception) -> None:
    network.error = error
    with pytest.raises(UserError, match=r"data=small cannot be read from OpenML .* give their folder as data.path="):
        read_openml("small", SMALL, tmp_path)
    assert not list(tmp_path.iterdir())


def test_another_order_is_refused(tmp_path: Path, network: OpenML) -> None:
    network.y = Y[::-1]
    with pytest.raises(UserError, match="OpenML's small is not in the order of the original"):
        read_openml("small", SMALL, tmp_path)


def test_a_damaged_cache_is_named(tmp_path: Path, network: OpenML) -> None:
    read_openml("small", SMALL, tmp_path)
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    content[60] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{path} is damaged .* delete it"):
        read_openml("small", SMALL, tmp_path)


@pytest.mark.parametrize("name", SOURCES)
def test_members_of_the_group_name_their_source(name: str, network: OpenML, tmp_path: Path) -> None:
    config = compose_config([f"data={name}"]).data
    assert config.name == name and config.path is None
    assert all(len(first) == 10 for first in SOURCES[name].first)
