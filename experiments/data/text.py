"""Text as sequences of characters."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import numpy as np
import torch

from experiments.data.dataset import Dataset
from experiments.data.download import check, download
from experiments.data.help_texts import help_texts
from experiments.data.sequences import split_tokens
from experiments.errors import UserError
from experiments.schemas.data import FileTextConfig, TextConfig


def load_text(config: TextConfig, device: torch.device) -> Dataset:
    """The last test_fraction of the text is the test set, and its characters are all of the text's.

    Raises UserError if the text cannot be had, is another one than data.sha256 says, or is too short.
    """
    content = read_text(config)
    sha256 = check(content, config.sha256, f"the text of data={config.name}")
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"the text of data={config.name} is not UTF-8: {error}") from error
    if config.limit is not None and config.limit < 1:
        raise UserError(f"data.limit={config.limit} must be positive")
    if config.limit is not None:
        text = text[: config.limit * config.context + 1]
    characters, tokens = np.unique(np.frombuffer(text.encode("utf-32-le"), np.uint32), return_inverse=True)
    train, test = split_tokens(tokens, config.context, config.test_fraction, f"{len(text)} characters")
    announce(config.name, len(text), len(characters), sha256)
    return Dataset(
        train.to(device),
        test.spread(config.evaluated).to(device),
        classes=len(characters),
        sample=train.spread(config.evaluated).to(device),
        sha256=sha256,
        vocabulary="".join(map(chr, characters)),
    )


def read_text(config: TextConfig) -> bytes:
    if not isinstance(config, FileTextConfig):
        return help_texts()
    if config.path is not None and config.url is None:
        path = Path(config.path)
    elif config.url is not None and config.path is None and config.sha256 is not None:
        path = download(config.url, config.sha256, Path(config.cache))
    else:
        raise UserError("data=text needs a text: give data.path=FILE, or data.url=URL with data.sha256=CHECKSUM")
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"data.path={path} cannot be read: {error.strerror}") from error


@cache
def announce(name: str, length: int, characters: int, sha256: str) -> None:
    """Once a process, since numbers hold for this text alone."""
    print(f"data={name}: {length:,} characters, {characters} different ones, sha256 {sha256}", file=sys.stderr)
