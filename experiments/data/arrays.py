"""Arrays of examples in memory, split at random, once for all runs."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from experiments.data.dataset import Dataset, Split
from experiments.errors import UserError, choose
from experiments.schemas.data import ArraysConfig


def load_arrays(config: ArraysConfig, device: torch.device) -> Dataset:
    """Raises UserError if the file is missing or does not hold classified examples."""
    x, y = choose(READERS, config.name, "data.name")(config)
    try:
        parts = train_test_split(
            channels_first(x), y, test_size=config.test_fraction, random_state=config.split_seed, stratify=y
        )
    except ValueError as error:
        raise UserError(f"data.test_fraction={config.test_fraction} does not split this data: {error}") from error
    x_train, x_test, y_train, y_test = (torch.as_tensor(part) for part in parts)
    # To [-1, 1] by one factor for all features: each feature by its own deviation would blow up
    # the digits' border pixels, which are zero in nearly every image.
    scale = x_train.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return Dataset(
        train=Split((x_train / scale).to(device), y_train.to(device)),
        test=Split((x_test / scale).to(device), y_test.to(device)),
        classes=int(y.max()) + 1,
    )


def read_digits(config: ArraysConfig) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    x, y = load_digits(return_X_y=True)
    return x.reshape(-1, 8, 8).astype(np.float32), y.astype(np.int64)


def read_npz(config: ArraysConfig) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    if config.path is None or not (path := Path(config.path)).is_file():
        raise UserError(f"data.path={config.path} is not a file: give an .npz file with the arrays x and y")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            x, y = arrays["x"], arrays["y"]
    except (KeyError, OSError, TypeError, ValueError) as error:
        raise UserError(f"data.path={path} is not an .npz file with the arrays x and y: {error}") from error
    if x.ndim < 2 or y.shape != x.shape[:1] or y.dtype.kind not in "iu" or y.min() < 0:
        raise UserError(
            f"{path} holds x {x.shape} and y {y.shape} of {y.dtype}; expected x (examples, ...) "
            "and y (examples,), integers from 0"
        )
    return x.astype(np.float32), y.astype(np.int64)


READERS = {"digits": read_digits, "npz": read_npz}


Number = TypeVar("Number", bound=np.generic)

MOST_CHANNELS = 4  # colour with transparency


def channels_first(x: NDArray[Number]) -> NDArray[Number]:
    """Images (N, H, W[, C]) as (N, C, H, W); anything else as it is.

    Raises UserError for images whose channels seem to come first, which would be taken for rows.
    """
    if x.ndim == 3:
        return x[:, None]
    if x.ndim == 4 and x.shape[1] <= MOST_CHANNELS < x.shape[3]:
        raise UserError(
            f"images {x.shape} seem to have their channels first: give them as (examples, height, width, channels)"
        )
    return np.ascontiguousarray(np.moveaxis(x, -1, 1)) if x.ndim == 4 else x
