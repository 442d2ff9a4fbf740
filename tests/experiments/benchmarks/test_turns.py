"""Who is first, and by how much."""

from __future__ import annotations

from itertools import islice

import pytest

from experiments.benchmarks.turns import alternate, ratio


def test_everyone_is_in_every_place_once_a_round() -> None:
    assert list(islice(alternate("abc"), 4)) == [("a", "b", "c"), ("b", "c", "a"), ("c", "a", "b"), ("a", "b", "c")]


def test_ratios_are_taken_turn_by_turn() -> None:
    assert ratio([2.0, 30.0, 4.0], [1.0, 10.0, 4.0]) == [1.5, 2.0, 2.5]  # of 1, 2, 3
    assert ratio([3.0], [2.0]) == [1.5] * 3
    with pytest.raises(ValueError, match="zip"):
        ratio([1.0, 2.0], [1.0])
