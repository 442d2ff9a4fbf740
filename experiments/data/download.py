"""Files from the network, kept under the name of their content."""

from __future__ import annotations

import hashlib
from pathlib import Path
from urllib.request import urlopen

from experiments.atomic import atomic_write
from experiments.errors import UserError

TIMEOUT = 30.0  # seconds without a byte


def download(url: str, sha256: str, cache: Path) -> Path:
    """The file with this checksum, from the cache or else from the network.

    Raises UserError where it cannot be had, or is another file.
    """
    path = cache.expanduser() / sha256
    if path.is_file():
        return path
    way_out = "download it elsewhere, and give the file as data.path=FILE"
    try:
        with urlopen(url, timeout=TIMEOUT) as response:
            content: bytes = response.read()
    except (OSError, ValueError) as error:
        raise UserError(f"data.url={url} cannot be read ({error}): {way_out}") from error
    check(content, sha256, f"what data.url={url} delivers")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(content)
    except OSError as error:
        raise UserError(f"data.cache={cache} cannot be written ({error}): give another folder") from error
    return path


def check(content: bytes, sha256: str | None, what: str) -> str:
    """The checksum. Raises UserError if it is not the expected one; any will do where None is expected."""
    found = hashlib.sha256(content).hexdigest()
    if sha256 not in (None, found):
        raise UserError(f"{what} has sha256 {found}, and data.sha256={sha256}: one of them is not what was meant")
    return found
