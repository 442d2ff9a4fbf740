from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from experiments.data.augmentation import Augmentation

BOTH = Augmentation(2, flip=True)


def test_an_image_is_cut_and_mirrored_as_drawn() -> None:
    x = torch.randn(6, 3, 5, 7)
    draws = torch.tensor([[0, 0, 0], [2, 2, 0], [4, 4, 0], [1, 3, 0], [2, 2, 1], [4, 0, 1]])
    result = BOTH.apply(x, draws)
    for image, (row, column, mirrored), found in zip(x, draws.tolist(), result, strict=True):
        expected = F.pad(image, [2] * 4)[:, row : row + 5, column : column + 7]
        assert torch.equal(found, expected.flip(-1) if mirrored else expected)


@pytest.mark.parametrize(
    ("augmentation", "values"),
    [(BOTH, (5, 5, 2)), (Augmentation(0, flip=True), (1, 1, 2)), (Augmentation(1, flip=False), (3, 3, 1))],
)
def test_all_draws_are_equally_frequent(augmentation: Augmentation, values: tuple[int, ...]) -> None:
    draws = augmentation.draws(0, 4000, 0, 4000)
    for column, count in zip(draws.T, values, strict=True):
        frequencies = np.bincount(column, minlength=count) / 4000
        assert len(frequencies) == count and abs(frequencies - 1 / count).max() < 0.03


def test_draws_belong_to_positions_in_the_stream() -> None:
    whole = BOTH.draws(0, 10, 0, 35)
    parts = [BOTH.draws(0, 10, start, start + 7) for start in range(0, 35, 7)]
    assert np.array_equal(whole, np.concatenate(parts))
    assert not np.array_equal(whole[:10], whole[10:20])
    assert not np.array_equal(whole, BOTH.draws(1, 10, 0, 35))


def test_draws_are_not_those_that_order_the_examples() -> None:
    same = np.random.default_rng([0, 0]).integers(0, [5, 5, 2], size=(10, 3))
    assert not np.array_equal(BOTH.draws(0, 10, 0, 10), same)
