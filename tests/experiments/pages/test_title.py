from __future__ import annotations

from pathlib import Path

import pytest

from experiments.config import compose_config
from experiments.fingerprint import as_dict, flatten
from experiments.pages.runs import Run
from experiments.pages.title import named, title
from tests.experiments.pages.synthetic import collected, write_run, write_sweep

MANY = [
    *("train.epochs=1", "model.dropout=0", "seed=3", "data.split_seed=1", "hardware.threads=2", "optimizer.lr=1"),
    "train.batch_size=4",
]


def titled(*paths: Path) -> str:
    return title(collected(*paths), paths)


def test_a_single_run_is_called_by_its_name_and_what_it_differs_in(tmp_path: Path) -> None:
    path = write_run(
        tmp_path / "2031-01-31_12-00-00", lr=0.5, batch_size=64, seed=3, model__name="mlp", model__dropout=0.5
    )
    assert titled(path) == "synthetic: Adam, <fixed> · B = 64 · lr = 0.5 · seed = 3"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], "mine"),
        (["optimizer=batch_invariant_sgd", "model=convnet"], "mine: convnet · ours, SGD"),
        (["optimizer=batch_invariant_sgd", "optimizer.lr=0.5", "tracker=none"], "mine: ours, SGD · lr = 0.5"),
        (["train.epochs=0.4", "model.dropout=0", "seed=3"], "mine: dropout = 0 · seed = 3 · epochs = 0.4"),
        (MANY, "mine: B = 4 · lr = 1 · split_seed = 1 · threads = 2 · dropout = 0 · seed = 3 and 1 more"),
    ],
)
def test_what_a_run_differs_in_from_the_defaults(overrides: list[str], expected: str) -> None:
    config = compose_config(["name=mine", *overrides])
    assert named(Run(Path("run"), dict(flatten(as_dict(config))), None, {}, {})) == expected


def test_a_run_of_unknown_members_keeps_its_name(tmp_path: Path) -> None:
    assert titled(write_run(tmp_path / "run", method="forgotten")) == "synthetic"


def test_a_run_without_a_name_is_called_by_its_directory(tmp_path: Path) -> None:
    path = write_run(tmp_path / "old")
    (path / "config.json").unlink()
    assert titled(path) == "old"


def test_several_runs_are_called_by_their_paths(tmp_path: Path) -> None:
    paths = [write_sweep(tmp_path / name, ["sgd"], [0.01], [4], [0, 1]) for name in "abcde"]
    assert titled(*paths[:1]) == "a"
    assert titled(*paths) == "a, b, c and 2 more"
