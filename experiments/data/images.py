"""MNIST, Fashion-MNIST and CIFAR-10, with the training and test sets of the originals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from experiments.data.arrays import channels_first
from experiments.data.augmentation import Augmentation
from experiments.data.cifar import read_batch
from experiments.data.dataset import Dataset, Split, placed
from experiments.data.idx import read_idx
from experiments.data.openml import SOURCES, read_openml
from experiments.errors import UserError, choose
from experiments.schemas.data import ImagesConfig

IDX = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
CIFAR_BATCHES = 5  # with fewer of them it would be another, smaller data set
NPZ = ("x_train", "y_train", "x_test", "y_test")  # as Keras names them
WAYS = (
    f"give an .npz file with {', '.join(NPZ)}, a folder with {', '.join(IDX)} (.gz too), or one with CIFAR-10's "
    f"data_batch_1 to {CIFAR_BATCHES} and test_batch"
)


Pair = tuple[NDArray[Any], NDArray[Any]]  # images and classes of one set


def load_images(config: ImagesConfig, device: torch.device) -> Dataset:
    """Each channel with mean 0 and variance 1 over the training set.

    Raises UserError where the images cannot be had, or are none.
    """
    source = choose(SOURCES, config.name, "data.name")
    if config.crop < 0:
        raise UserError(f"data.crop={config.crop} must not be negative")
    if config.path is None:
        pairs = read_openml(config.name, source, Path(config.cache))
    else:
        pairs = read_local(Path(config.path))
    (x_train, y_train), (x_test, y_test) = (checked(*pair, config) for pair in pairs)
    mean, variance = (
        of(x_train, axis=(0, 2, 3), keepdims=True, dtype=np.float64).astype(np.float32) for of in (np.mean, np.var)
    )
    scale = np.sqrt(np.maximum(variance, np.finfo(np.float32).tiny))
    train, test = (
        placed(Split(torch.from_numpy((x - mean) / scale), torch.from_numpy(y)), device)
        for x, y in ((x_train, y_train), (x_test, y_test))
    )
    augmentation = Augmentation(config.crop, config.flip) if config.crop or config.flip else None
    return Dataset(train, test, classes=int(y_train.max()) + 1, augmentation=augmentation)


def read_local(path: Path) -> tuple[Pair, Pair]:
    """Images, channels first, and classes of the training set and of the test set."""
    if path.is_file():
        try:
            with np.load(path, allow_pickle=False) as arrays:
                x_train, y_train, x_test, y_test = (arrays[name] for name in NPZ)
        except Exception as error:  # a damaged archive raises nearly anything
            raise UserError(f"data.path={path} is not an .npz file of images ({error}): {WAYS}") from error
        return (channels_first(x_train), y_train), (channels_first(x_test), y_test)
    batches = [path / f"data_batch_{number}" for number in range(1, CIFAR_BATCHES + 1)]
    if all(batch.is_file() for batch in (*batches, path / "test_batch")):
        x, y = zip(*(read_batch(batch) for batch in batches), strict=True)
        return (np.concatenate(x), np.concatenate(y)), read_batch(path / "test_batch")
    files = [file for name in IDX for file in (path / name, path / f"{name}.gz") if file.is_file()]
    if [file.name.removesuffix(".gz") for file in files] != list(IDX):
        raise UserError(f"data.path={path} does not hold the files of a known set: {WAYS}")
    x_train, y_train, x_test, y_test = (channels_first(read_idx(file)) for file in files)
    return (x_train, y_train), (x_test, y_test)


def checked(x: NDArray[Any], y: NDArray[Any], config: ImagesConfig) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    if x.ndim != 4 or not len(x) or y.size != len(x) or y.dtype.kind not in "iu" or y.min() < 0:
        raise UserError(
            f"data={config.name} has images {x.shape} and classes {y.shape} of {y.dtype} in {config.path}; expected "
            "(examples, channels, height, width) and (examples,), integers from 0"
        )
    return x.astype(np.float32), y.ravel().astype(np.int64)
