"""Images from openml.org, through scikit-learn.

A file is checked by the MD5 that OpenML's own description of this version of the data gives: scikit-learn does so, and
a checksum of ours could be of nothing else. That its rows are in the original order, training set first, is checked by
the first classes of both sets. The parsed arrays are kept, since parsing takes minutes; zip checks them.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import fetch_openml

from experiments.atomic import atomic_write
from experiments.errors import UserError


@dataclass(frozen=True)
class Source:
    """first: the classes of the first ten examples of the training set, and of the test set."""

    identifier: int  # of the version on OpenML
    shape: tuple[int, int, int]  # of one image, channels first
    training: int  # the examples of the training set, which come first
    first: tuple[str, str]


SOURCES = {
    "mnist": Source(554, (1, 28, 28), 60_000, ("5041921314", "7210414959")),
    "fashion_mnist": Source(40996, (1, 28, 28), 60_000, ("9003027255", "9211614657")),
    "cifar10": Source(40927, (3, 32, 32), 50_000, ("6994112783", "3886610631")),
}


Pair = tuple[NDArray[np.float32], NDArray[np.int64]]  # images and classes of one set


def read_openml(name: str, source: Source, cache: Path) -> tuple[Pair, Pair]:
    """Images and classes of the training set and of the test set, from the cache or else from the network.

    Raises UserError where they cannot be had.
    """
    path = cache.expanduser() / f"{name}_openml_{source.identifier}.npz"
    if not path.is_file():
        x, y = fetch(name, source, cache.expanduser())
        with atomic_write(path) as file:
            np.savez_compressed(file, x=x, y=y)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            x, y = arrays["x"].reshape(-1, *source.shape), arrays["y"]
    except Exception as error:  # a damaged archive raises nearly anything
        raise UserError(f"{path} is damaged ({error}): delete it, and it is made again") from error
    train, test = (x[: source.training], y[: source.training]), (x[source.training :], y[source.training :])
    found = tuple("".join(map(str, labels[:10])) for _, labels in (train, test))
    if found != source.first:
        raise UserError(
            f"OpenML's {name} is not in the order of the original: its classes begin with {found}, where "
            f"{source.first} was expected. Give the original files as data.path=FOLDER"
        )
    return train, test


def fetch(name: str, source: Source, cache: Path) -> Pair:
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of every attempt; the message at the end says it once
            x, y = fetch_openml(
                data_id=source.identifier,
                data_home=str(cache),
                return_X_y=True,
                as_frame=False,
                parser="liac-arff",  # the other one needs pandas
            )
        return np.asarray(x, np.float32), np.asarray(y).astype(np.int64)
    except (OSError, ValueError) as error:
        raise UserError(
            f"data={name} cannot be read from OpenML ({error}): download the original files elsewhere, and give their "
            "folder as data.path=FOLDER"
        ) from error
