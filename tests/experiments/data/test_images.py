from __future__ import annotations

import gzip
import io
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.data import Dataset, load_data
from experiments.data.images import IDX
from experiments.errors import UserError
from experiments.schemas.data import ImagesConfig

CPU = torch.device("cpu")
RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (30, 28, 28)).astype(np.uint8)
COLOUR = RNG.integers(0, 256, (36, 3, 32, 32)).astype(np.uint8)
CLASSES = (np.arange(36) * 7 % 10).astype(np.uint8)


def config(path: Path, name: str = "mnist", crop: int = 0) -> ImagesConfig:
    return ImagesConfig(name, str(path), "unused", crop=crop, flip=False)


class Python2(pickle._Pickler):
    """Writes what the authors' Python 2 wrote: bytes as strings, and numpy under the names of that time."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_bytes(self, content: bytes) -> None:
        self.write(pickle.BINSTRING + struct.pack("<i", len(content)) + content)
        self.memoize(content)

    dispatch[bytes] = save_bytes


def python2(batch: object) -> bytes:
    file = io.BytesIO()
    Python2(file, protocol=2).dump(batch)
    return file.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()


def written(folder: Path, form: str) -> Path:
    """The images as one of the forms that are read, 20 or 24 of them to train on."""
    if form.startswith("idx"):
        for name, array in zip(IDX, (GREY[:20], CLASSES[:20], GREY[20:], CLASSES[20:30]), strict=True):
            content = idx(array)
            compressed = form == "idx.gz"
            (folder / f"{name}.gz" if compressed else folder / name).write_bytes(
                gzip.compress(content) if compressed else content
            )
        return folder
    if form == "npz":  # as Keras keeps CIFAR-10
        pixels, y = COLOUR.transpose(0, 2, 3, 1), CLASSES[:, None]
        np.savez(folder / "own.npz", x_train=pixels[:24], y_train=y[:24], x_test=pixels[24:], y_test=y[24:])
        return folder / "own.npz"
    parts = {f"data_batch_{i + 1}": part for i, part in enumerate(np.array_split(np.arange(24), 5))}
    for name, part in (parts | {"test_batch": np.arange(24, 36)}).items():
        batch = {b"data": COLOUR[part].reshape(len(part), -1), b"labels": CLASSES[part].tolist()}
        (folder / name).write_bytes(python2(batch))
    return folder


def raw(data: Dataset, images: np.ndarray, training: int) -> tuple[np.ndarray, np.ndarray]:
    """The images of the data as they were before they were normalised."""
    train = images[:training]
    mean, deviation = (f(train.astype(np.float64), (0, 2, 3), keepdims=True) for f in (np.mean, np.std))
    both = (np.rint(split.x.numpy() * deviation + mean).astype(np.uint8) for split in (data.train, data.test))
    return next(both), next(both)


@pytest.mark.parametrize(
    ("form", "name"), [("idx", "mnist"), ("idx.gz", "fashion_mnist"), ("npz", "cifar10"), ("pickle", "cifar10")]
)
def test_local_files_keep_their_sets(tmp_path: Path, form: str, name: str) -> None:
    images, training = (GREY[:, None], 20) if "idx" in form else (COLOUR, 24)
    data = load_data(config(written(tmp_path, form), name), CPU)
    for found, expected in zip(raw(data, images, training), (images[:training], images[training:]), strict=True):
        assert np.array_equal(found, expected)
    assert torch.cat([data.train.y, data.test.y]).tolist() == CLASSES[: len(images)].tolist()
    assert data.shape == images.shape[1:] and data.classes == 10 and data.augmentation is None
    assert data.train.x.dtype == torch.float32 and data.train.y.dtype == torch.int64


def test_every_channel_is_normalised_by_the_training_set(tmp_path: Path) -> None:
    data = load_data(config(written(tmp_path, "npz"), "cifar10", crop=4), CPU)
    deviation, mean = torch.std_mean(data.train.x.double(), (0, 2, 3), correction=0)
    assert torch.allclose(mean, torch.zeros(3).double(), atol=1e-6)
    assert torch.allclose(deviation, torch.ones(3).double(), atol=1e-6)
    assert data.test.x.mean().abs() > 1e-5
    assert data.augmentation is not None and data.augmentation.crop == 4


class Harmful:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("harm",)


def test_a_pickle_may_call_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = written(tmp_path, "pickle")
    (folder / "data_batch_2").write_bytes(pickle.dumps({b"data": Harmful(), b"labels": []}))
    with pytest.raises(UserError, match=r"data_batch_2 is not a batch .* asks for builtins.print, which no array"):
        load_data(config(folder, "cifar10"), CPU)
    assert "harm" not in capsys.readouterr().out
    (folder / "data_batch_2").write_bytes(
        pickle.dumps({b"data": COLOUR.astype(float), b"labels": CLASSES.tolist()}, protocol=3)
    )
    with pytest.raises(UserError, match="data_batch_2 is not a batch .* data of float64"):
        load_data(config(folder, "cifar10"), CPU)


def test_no_batch_may_be_missing(tmp_path: Path) -> None:
    folder = written(tmp_path, "pickle")
    (folder / "data_batch_4").unlink()
    with pytest.raises(UserError, match="does not hold the files of a known set: .* data_batch_1 to 5 and test_batch"):
        load_data(config(folder, "cifar10"), CPU)


REFUSED = {
    "empty folder": ({}, "does not hold the files of a known set: give an .npz file with x_train"),
    "missing file": ({IDX[0]: idx(GREY), IDX[1]: idx(CLASSES)}, "does not hold the files of a known set"),
    "cut": (dict.fromkeys(IDX, idx(GREY)[:-1]), "images-idx3-ubyte is not a whole IDX file"),
    "too short": (dict.fromkeys(IDX, b"\0\0"), "images-idx3-ubyte is not a whole IDX file"),
    "other type": (dict.fromkeys(IDX, b"\0\0\x0d" + idx(CLASSES)[3:]), "is not a whole IDX file of bytes"),
    "damaged": ({f"{name}.gz": gzip.compress(idx(GREY))[:-9] for name in IDX}, "ubyte.gz cannot be read"),
    "lengths": (dict(zip(IDX, [idx(GREY), idx(CLASSES)] * 2, strict=True)), r"images \(30, 1, 28, 28\) and classes"),
    "no images": (dict.fromkeys(IDX, idx(CLASSES)), r"images \(36,\) and classes \(36,\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_folders_are_named(tmp_path: Path, case: str) -> None:
    files, message = REFUSED[case]
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_data(config(tmp_path), CPU)


def test_other_refusals(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"data.path={tmp_path / 'nowhere'} does not hold"):
        load_data(config(tmp_path / "nowhere"), CPU)
    (tmp_path / "own.npz").write_bytes(b"no archive")
    with pytest.raises(UserError, match="own.npz is not an .npz file of images"):
        load_data(config(tmp_path / "own.npz"), CPU)
    x, y = COLOUR.transpose(0, 2, 3, 1), CLASSES.astype(int)
    np.savez(tmp_path / "own.npz", x_train=x, y_train=y, x_test=x, y_test=y - 1)
    with pytest.raises(UserError, match=r"data=cifar10 has images .* in .*own.npz; expected .* integers from 0"):
        load_data(config(tmp_path / "own.npz", "cifar10"), CPU)
    with pytest.raises(UserError, match="data.name=imagenet is unknown: choose one of mnist, fashion_mnist, cifar10"):
        load_data(config(tmp_path, "imagenet"), CPU)
    with pytest.raises(UserError, match="data.crop=-1 must not be negative"):
        load_data(config(tmp_path, crop=-1), CPU)
