from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.data import load_data
from experiments.errors import UserError
from experiments.schemas.data import ArraysConfig

CPU = torch.device("cpu")
DIGITS = ArraysConfig("digits", None, 0.2, 0)


def npz(path: Path, **arrays: np.ndarray) -> ArraysConfig:
    np.savez(path, **arrays)
    return ArraysConfig("npz", str(path), 0.25, 0)


def test_digits_are_split_once_and_evenly_over_classes() -> None:
    data, again = load_data(DIGITS, CPU), load_data(DIGITS, CPU)
    assert (len(data.train), len(data.test), data.classes, data.shape) == (1437, 360, 10, (1, 8, 8))
    assert torch.equal(data.train.x, again.train.x) and torch.equal(data.test.y, again.test.y)
    assert data.test.y.bincount().min() >= 34 and data.test.y.bincount().max() <= 38
    assert data.train.x.min() == 0 and data.train.x.max() == 1 and data.train.x.dtype == torch.float32


def test_training_and_test_images_are_disjoint() -> None:
    data = load_data(DIGITS, CPU)
    train = {image.numpy().tobytes() for image in data.train.x}
    assert not any(image.numpy().tobytes() in train for image in data.test.x)


@pytest.mark.parametrize(
    ("shape", "expected"), [((40, 30), (30,)), ((40, 6, 4), (1, 6, 4)), ((40, 6, 4, 3), (3, 6, 4))]
)
def test_own_file(tmp_path: Path, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).normal(size=shape)
    data = load_data(npz(tmp_path / "own.npz", x=x, y=np.arange(40) % 4), CPU)
    assert (data.shape, len(data.train), len(data.test), data.classes) == (expected, 30, 10, 4)
    # Signs survive the scaling, and tell the examples apart.
    images = x[:, None] if x.ndim == 3 else np.moveaxis(x, -1, 1) if x.ndim == 4 else x
    classes = {np.sign(image).astype(np.float32).tobytes(): i % 4 for i, image in enumerate(images)}
    assert [classes[image.sign().numpy().tobytes()] for image in data.train.x] == data.train.y.tolist()


REFUSED = {
    "no y": ({"x": np.zeros((4, 2))}, "arrays x and y"),
    "lengths": ({"x": np.zeros((4, 2)), "y": np.zeros(3, int)}, r"x \(4, 2\) and y \(3,\)"),
    "real classes": ({"x": np.zeros((4, 2)), "y": np.zeros(4)}, "float64"),
    "negative": ({"x": np.zeros((4, 2)), "y": np.full(4, -1)}, "integers from 0"),
    "channels first": ({"x": np.zeros((40, 3, 6, 5)), "y": np.arange(40) % 4}, "seem to have their channels first"),
    "one each": ({"x": np.zeros((4, 2)), "y": np.arange(4)}, "data.test_fraction=0.25 does not split this data"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_files_are_named(tmp_path: Path, case: str) -> None:
    arrays, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        load_data(npz(tmp_path / "own.npz", **arrays), CPU)


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="data.path=nowhere.npz is not a file: give an .npz"):
        load_data(ArraysConfig("npz", "nowhere.npz", 0.2, 0), CPU)
    path = tmp_path / "text.npz"
    path.write_text("not an archive")
    with pytest.raises(UserError, match=f"{path} is not an .npz file"):
        load_data(ArraysConfig("npz", str(path), 0.2, 0), CPU)
    with pytest.raises(UserError, match="data.name=mnist is unknown: choose one of digits, npz"):
        load_data(ArraysConfig("mnist", None, 0.2, 0), CPU)
