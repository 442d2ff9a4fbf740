from __future__ import annotations

from pathlib import Path

import numpy as np

from experiments.pages.curves import POINTS, curve, layers, metrics
from experiments.pages.groups import Group
from experiments.pages.runs import Run
from tests.experiments.pages.synthetic import EXAMPLES, collected, loss, write_run


def made(*series: dict[int, float]) -> Group:
    runs = [Run(Path(str(i)), {"seed": i}, None, {"loss": values}, {}) for i, values in enumerate(series)]
    return Group("g0", "", {}, tuple(runs))


def test_the_mean_in_the_band_of_its_seeds(tmp_path: Path) -> None:
    for seed in range(3):
        write_run(tmp_path / str(seed), seed=seed)
    (group,) = collected(tmp_path).groups
    found = curve(group, "loss/train")
    assert found is not None and found.examples.tolist() == EXAMPLES
    seeds = np.array([loss("adam", 0.01, 16, seed) for seed in range(3)])
    np.testing.assert_allclose(found.mean, seeds.mean(axis=0))
    np.testing.assert_array_equal(found.low, seeds.min(axis=0))
    np.testing.assert_array_equal(found.high, seeds.max(axis=0))


def test_it_ends_where_the_first_seed_does(tmp_path: Path) -> None:
    """Beyond it the mean would be that of the seeds that did not break."""
    write_run(tmp_path / "a", seed=0)
    write_run(tmp_path / "b", seed=1, status="diverged")
    (group,) = collected(tmp_path).groups
    found = curve(group, "loss/train")
    assert found is not None and found.examples.tolist() == EXAMPLES[:5]


def test_a_seed_without_a_value_is_left_out_where_it_has_none() -> None:
    found = curve(made({1: 1.0, 2: 2.0, 3: 3.0}, {1: 3.0, 3: 5.0}), "loss")
    assert found is not None
    assert (found.mean.tolist(), found.high.tolist()) == ([2.0, 2.0, 4.0], [3.0, 2.0, 5.0])
    assert curve(made({1: 1.0}), "accuracy") is None
    assert curve(made({2: 1.0}, {1: 1.0}), "loss") is not None


def test_long_runs_are_thinned_and_keep_their_ends() -> None:
    found = curve(made({n: float(n) for n in range(10_000)}), "loss")
    assert found is not None and len(found.mean) == POINTS
    assert (found.examples[0], found.examples[-1]) == (0, 9_999)
    np.testing.assert_array_equal(found.examples, found.mean)


def test_metrics_and_layers_by_name(tmp_path: Path) -> None:
    (group,) = collected(write_run(tmp_path / "run")).groups
    assert metrics([group]) == ["loss/train", "loss/test", "accuracy/test", "gradient/noise_scale"]
    assert layers(group) == ["1", "4"]
