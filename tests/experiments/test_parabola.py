import numpy as np
import pytest

from experiments.parabola import lowest_point


def test_the_lowest_point_of_a_parabola_and_what_is_none() -> None:
    octaves = np.arange(-2.0, 3)
    assert lowest_point(octaves, np.exp(0.3 * (octaves - 0.37) ** 2)) == pytest.approx(0.37)
    assert lowest_point(octaves, np.exp(octaves)) == -2
    assert lowest_point(octaves, np.ones(5)) == -2
    assert lowest_point(octaves, np.array([1, 1, 0.5, 0.5, 0.6])) == pytest.approx(0.5)
