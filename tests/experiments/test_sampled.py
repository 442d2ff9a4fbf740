"""The table of what a part of the statistics costs, of imaginary runs and of short ones."""

from __future__ import annotations

import math

from experiments.sampled import Run, run, table, title


def test_differences_are_taken_seed_by_seed() -> None:
    runs = [
        Run("R = 1", every, 1.0, 64, seed, base + change, 0.0)
        for seed, base in enumerate((1.0, 2.0))
        for every, change in ((1, 0.0), (4, 0.5))
    ]
    _, row = table(runs, 24).rows
    assert row == ["every=4", "2.0000 ± 0.7071", "+0.5000 ± 0.0000"]


def test_titles() -> None:
    assert [title(1, 1.0), title(1, 1 / 16), title(8, 1 / 4)] == ["all", "fraction=1/16", "every=8, fraction=1/4"]


def test_a_run_learns_and_repeats() -> None:
    first, again = (run("R = 1", 4, 0.25, 64, 0, 0.5) for _ in range(2))
    assert first == again and first.train_loss < math.log(10)
