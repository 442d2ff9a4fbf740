"""The format of MNIST's own files (Y. LeCun): zero, zero, type, dimensions, sizes, and the numbers, all big-endian."""

from __future__ import annotations

import gzip
import zlib
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from experiments.errors import UserError

UNSIGNED_BYTE = 8


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Raises UserError for a file that holds no bytes in this format; it may be compressed by gzip."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    header = np.frombuffer(content[:4], np.uint8)
    dimensions = int(header[3]) if len(header) == 4 else 0
    shape = np.frombuffer(content[4 : 4 + 4 * dimensions], ">i4").tolist() if dimensions else []
    begin = 4 + 4 * dimensions
    if not shape or header[:3].tolist() != [0, 0, UNSIGNED_BYTE] or len(content) - begin != prod(shape):
        raise UserError(
            f"{path} is not a whole IDX file of bytes: {len(content)} bytes, beginning with {content[:4]!r}"
        )
    return np.frombuffer(content, np.uint8, offset=begin).reshape(shape)
