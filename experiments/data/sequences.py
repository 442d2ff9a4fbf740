"""From one long row of tokens to examples; the target of a token is the one after it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from experiments.data.dataset import Split
from experiments.errors import UserError


def split_tokens(tokens: NDArray[Any], context: int, test_fraction: float, what: str) -> tuple[Split, Split]:
    """Training and test set, views of the tokens; the last test_fraction of them is the test set.

    Raises UserError for numbers that are out of range, and too few tokens for an example in each set.
    """
    if context < 1:
        raise UserError(f"data.context={context} must be positive")
    if not 0 < test_fraction < 1:
        raise UserError(f"data.test_fraction={test_fraction} must be between 0 and 1")
    border = len(tokens) - round(test_fraction * (len(tokens) - 1)) - 1
    # The token at the border is the last target of one set and the first input of the other.
    train, test = tokens[: border + 1], tokens[border:]
    if min(len(train), len(test)) <= context:
        raise UserError(
            f"{what} are too few for data.context={context} in both sets of data.test_fraction={test_fraction}: "
            "give more, or a shorter context"
        )
    return windows(train, context), windows(test, context)


def windows(tokens: NDArray[Any], context: int) -> Split:
    """Sequences one after the other, without overlap: x and y (N, T), y one token further than x."""
    count = (len(tokens) - 1) // context
    x, y = (torch.from_numpy(tokens[i : i + count * context].reshape(count, context)) for i in (0, 1))
    return Split(x, y, mapped=isinstance(tokens, np.memmap))
