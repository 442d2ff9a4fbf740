import pytest

from experiments.benchmarks.scaling import slope


def test_slope_is_the_exponent_of_a_power() -> None:
    x = [1, 2, 4, 8]
    assert slope(x, [3 * v**1.5 for v in x]) == pytest.approx(1.5)
    assert slope([1, 2, 4], [1.0, 2.0, 1.0]) == pytest.approx(0)
