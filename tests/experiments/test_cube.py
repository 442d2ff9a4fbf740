import numpy as np
import pytest

from experiments.cube import cube
from experiments.jobs import Result

RESULTS = [
    Result({"method": m, "lr": lr, "seed": s}, {"loss": [i, lr, s]}, 0.0)
    for i, m in enumerate("ab")
    for lr in (2.0, 1.0)
    for s in (0, 1, 2)
]


def test_an_axis_for_each_coordinate_and_then_those_of_the_value() -> None:
    found = cube(RESULTS, ("lr", "method", "seed"), lambda found: found["loss"])
    assert found.axes == {"lr": (2.0, 1.0), "method": ("a", "b"), "seed": (0, 1, 2)}
    assert found.values.shape == (2, 2, 3, 3)
    assert found.values[1, 0, 2].tolist() == [0, 1, 2]
    assert found.at(method="b", seed=1).tolist() == [[1, 2, 1], [1, 1, 1]]
    assert found.numbers("lr") == (2, 1)
    with pytest.raises(ValueError, match="could not convert"):
        found.numbers("method")


def test_a_part_of_the_results_by_coordinates() -> None:
    found = cube(RESULTS, ("seed",), lambda found: found["loss"][2], method="a", lr=1.0)
    np.testing.assert_array_equal(found.values, [0, 1, 2])


@pytest.mark.parametrize("results", [RESULTS[:-1], [*RESULTS, RESULTS[0]]], ids=["missing", "double"])
def test_what_is_no_grid_is_refused(results: list[Result]) -> None:
    with pytest.raises(ValueError, match="are no grid"):
        cube(results, ("method", "lr", "seed"), lambda found: found["loss"][0])
