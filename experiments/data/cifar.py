"""The batches of CIFAR-10 as its authors give them: pickles, of which nothing but arrays and containers is admitted."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
from numpy._core.multiarray import _reconstruct
from numpy.typing import NDArray

from experiments.errors import UserError

# By the name that numpy had when the files were written, and by that of today.
ADMITTED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


class ArraysOnly(pickle.Unpickler):
    """A pickle may call whatever it names; this one finds no name but those that an array is made of."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ADMITTED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no array needs")
        return ADMITTED[module, name]


def read_batch(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images (N, 3, 32, 32) and classes (N,). Raises UserError for a file that is no batch of CIFAR-10."""
    try:
        with path.open("rb") as file:
            batch = ArraysOnly(file, encoding="bytes").load()
        images, labels = np.asarray(batch[b"data"]), np.asarray(batch[b"labels"])
        if images.dtype != np.uint8 or labels.dtype.kind not in "iu":
            raise ValueError(f"data of {images.dtype} and labels of {labels.dtype}")
        return images.reshape(len(labels), 3, 32, 32), labels.astype(np.int64)
    except Exception as error:  # a damaged pickle raises nearly anything
        raise UserError(f"{path} is not a batch of CIFAR-10's Python version: {error}") from error
