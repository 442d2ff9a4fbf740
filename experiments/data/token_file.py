"""Tokens in a file that need not fit into memory: their numbers one after the other, in two bytes each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from experiments.data.dataset import Dataset
from experiments.data.sequences import split_tokens
from experiments.errors import UserError
from experiments.schemas.data import TokensConfig

CHUNK = 2**26  # tokens that are looked at together


def load_tokens(config: TokensConfig, device: torch.device) -> Dataset:
    """The training set stays in the file, which is mapped into memory; the last test_fraction of it is the test set.

    Raises UserError for a file that is missing, too short, or has tokens that are no words.
    """
    if config.path is None:
        raise UserError(
            "data=tokens needs a file: make one of any text by `python -m experiments.data.tokens TEXT OUT.bin`, and "
            "give data.path=OUT.bin with data.words=256"
        )
    tokens = open_tokens(Path(config.path))
    largest = max((int(tokens[i : i + CHUNK].max()) for i in range(0, len(tokens), CHUNK)), default=0)
    if largest >= config.words:
        raise UserError(f"{config.path} has the token {largest}, and data.words={config.words}: there are more words")
    if len(tokens) > 1 and largest > 0 and not tokens[1:CHUNK:2].any():
        raise UserError(f"{config.path} has a zero after every token: it seems to have four bytes each, instead of two")
    train, test = split_tokens(tokens, config.context, config.test_fraction, f"{len(tokens)} tokens")
    sample, test = (split.spread(config.evaluated).to(device) for split in (train, test))
    return Dataset(train, test, config.words, sample)


def open_tokens(path: Path) -> NDArray[np.uint16]:
    try:
        if path.suffix == ".npy":
            tokens = np.load(path, mmap_mode="c", allow_pickle=False)
        else:
            # Copy on write, which nothing does: torch warns of an array that it cannot write to.
            tokens = np.memmap(path, np.uint16, mode="c")
    except (OSError, ValueError) as error:
        raise UserError(f"data.path={path} is no file of tokens: {error}") from error
    if tokens.ndim != 1 or tokens.dtype != np.uint16:
        raise UserError(f"data.path={path} holds {tokens.dtype} {tokens.shape}; expected uint16 (tokens,)")
    return tokens
