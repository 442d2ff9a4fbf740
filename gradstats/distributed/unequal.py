"""Ranks with unequal numbers of examples, whose mean gradient is not that of all examples."""

from __future__ import annotations

import warnings
from collections.abc import Sequence


def warn_unequal(averager: str, examples: Sequence[int]) -> None:
    """Of a mean loss whose gradients `averager` averages over ranks, told how many examples each of them has."""
    warnings.warn(
        f"the ranks of {averager} backpropagated {', '.join(map(str, examples))} examples, and it averages ranks, not "
        f"examples: gradient and statistics are those of a mean in which an example of a smaller batch weighs more, "
        f"unless rank r multiplies the mean loss over its B_r examples by W B_r / B, with W = {len(examples)} ranks "
        f"and B = {sum(examples)} (the sum of losses over B_r by W / B)",
        stacklevel=3,
    )
