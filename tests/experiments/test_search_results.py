"""What is said of trials, whichever way a search comes out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import optuna
import pytest
from matplotlib.figure import Figure
from optuna.distributions import FloatDistribution

from experiments.errors import UserError
from experiments.schemas.run import Dimension, SearchConfig, Searched
from experiments.search_results import (
    Confirmation,
    Trial,
    command_of_best,
    draw,
    finding,
    importance_findings,
    importances,
    outcome,
    read,
    table,
    without,
)
from experiments.themes import DARK, LIGHT

SEARCH = SearchConfig(
    space={"optimizer.lr": Dimension(1e-3, 1, log=True), "train.decay": Dimension(choices=["none", "linear"])},
    loss=Searched.train,
    trials=5,
    startup=2,
    prune_after=0.2,
    seeds=[3, 4],
    confirm_seeds=[5, 6],
    sampler_seed=0,
)


def trial(number: int, state: str, losses: tuple[float, ...], lr: float = 0.01, decay: str = "none") -> Trial:
    return Trial(number, state, {"train.decay": decay, "optimizer.lr": lr}, losses, 1000, number == 0)  # type: ignore[arg-type]


TRIALS = [
    trial(0, "finished", (0.5, 0.6)),
    trial(1, "pruned", (0.1,), 0.5, "linear"),
    trial(2, "finished", (0.2, 0.3), 0.02),
    trial(3, "diverged", (2.5, 2.5), 0.9),
    trial(4, "refused", (), 0.8, "linear"),
]


def confirmation(best: list[float], first: list[float]) -> Confirmation:
    return Confirmation(np.array(best), np.array(first))


def test_a_gain_on_other_seeds_holds() -> None:
    found = finding(TRIALS, SEARCH, confirmation([0.3, 0.4, 0.35], [0.6, 0.72, 0.66]))
    assert found.verdict == "holds"
    assert "training loss of 5 trials is 0.25, of trial 2: train.decay=none optimizer.lr=0.02." in found.sentence
    assert "it has 0.35, and the first trial 0.66: a difference of -0.310 [-0.337, -0.283]." in found.sentence


@pytest.mark.parametrize(("best", "verdict"), [([0.7, 0.8], "does not hold"), ([0.4, 0.7], "cannot be judged")])
def test_a_gain_on_its_own_seeds_alone_does_not(best: list[float], verdict: str) -> None:
    assert finding(TRIALS, SEARCH, confirmation(best, [0.5, 0.6])).verdict == verdict


def test_no_gain_does_not_hold() -> None:
    found = finding([TRIALS[0], trial(1, "finished", (0.7, 0.8))], SEARCH, None)
    assert found.verdict == "does not hold" and found.sentence.endswith("That is what it began with.")


def test_a_first_trial_without_an_end_cannot_be_compared_with() -> None:
    found = finding([trial(0, "diverged", (2.5, 2.5)), trial(1, "finished", (0.4, 0.5))], SEARCH, None)
    assert found.verdict == "cannot be judged" and "The first trial, diverged, has no final loss." in found.sentence


def test_the_table_ranks_what_finished_and_keeps_columns_apart() -> None:
    made = table(TRIALS, SEARCH)
    assert made.columns == ["trial", "state", "training loss", "optimizer lr", "train decay", "examples"]
    assert made.rows[0] == ["2", "finished", "0.25", "0.02", "none", "1,000"]
    assert [row[0] for row in made.rows] == ["2", "0", "1", "3", "4"]
    assert made.rows[-1][2] == "–"
    assert table(TRIALS, replace(SEARCH, loss=Searched.test)).columns[2] == "test loss"


def study(*losses: tuple[float, float]) -> optuna.Study:
    """Of (lr, loss)."""
    made = optuna.create_study()
    for i, (lr, loss) in enumerate(losses):
        distributions = {"optimizer.lr": FloatDistribution(1e-3, 1, log=True), "x": FloatDistribution(0, 1)}
        params = {"optimizer.lr": lr, "x": (5 * i) % 12 / 12}
        made.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, value=loss))
    return made


def test_what_decides_the_loss_is_important() -> None:
    weights = importances(study(*((10 ** (-i / 4), 10 ** (-i / 4)) for i in range(12))))
    assert weights["optimizer.lr"] > 3 * weights["x"] and sum(weights.values()) == pytest.approx(1)
    (found,) = importance_findings({"a": 0.75, "b": 0.25}, ["finished", "pruned", "diverged"])
    assert found.sentence == "Of the variance of ln(loss) over the 2 trials that ended, by fANOVA: a 75%, b 25%."


@pytest.mark.parametrize(
    "losses", [[], [(0.1 / i, 0.1 / i) for i in range(1, 8)], [(0.1 / i, 0.5) for i in range(1, 9)]]
)
def test_few_or_equal_trials_have_no_importance(losses: list[tuple[float, float]]) -> None:
    assert importances(study(*losses)) == {} and importance_findings({}, []) == []


def test_the_figure_has_all_that_have_a_loss() -> None:
    for theme in (LIGHT, DARK):
        figure = draw(TRIALS, SEARCH, {"train.decay": 0.75, "optimizer.lr": 0.25}, theme)
        assert isinstance(figure, Figure)
        history, decay, lr = (axes for axes in figure.axes if axes.get_visible())
        for axes in (history, decay, lr):
            filled, open_, best = axes.collections
            assert [len(part.get_offsets()) for part in (filled, open_, best)] == [2, 2, 1]  # type: ignore[arg-type]
        assert best.get_offsets().tolist() == [[0.02, 0.25]]  # type: ignore[union-attr]
        assert (decay.get_xlabel(), decay.get_title("left")) == ("train.decay", "75% of the variance")
        assert [label.get_text() for label in decay.get_xticklabels()] == ["none", "linear"]
        assert lr.get_xscale() == "log" == history.get_yscale()
        assert history.lines[0].get_ydata().tolist() == pytest.approx([0.55, 0.55, 0.25, 0.25, 0.25])  # type: ignore[union-attr]


def test_results_are_written(tmp_path: Path) -> None:
    found = outcome(TRIALS, SEARCH, confirmation([0.3, 0.4], [0.5, 0.8]), {})
    assert found.caption.startswith("5 trials: 2 finished, 1 pruned, 1 diverged, 1 refused.")
    assert found.write_figure(tmp_path) == tmp_path / "figure.png"
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG" and (tmp_path / "figure.svg").stat().st_size > 1000


def test_the_best_command_has_the_values_once_and_no_search() -> None:
    typed = ["experiment=search_digits", "search.trials=3", "+search.space={a: {}}", "optimizer.lr=1", "directory=x"]
    command = command_of_best(TRIALS, [*typed, "resume=true", "seed=9"], SEARCH, Path("out"))
    assert command == (
        "python -m experiments.train experiment=search_digits '~search' train.decay=none optimizer.lr=0.02 "
        "seed=3 directory=out/best"
    )
    assert without(["~search", "++optimizer.lr=1", "optimizer=adam"], {"optimizer.lr"}) == ["optimizer=adam"]


def test_no_finished_trial_is_an_error() -> None:
    with pytest.raises(UserError, match="none of 0 trials came to its end; lower the learning rates"):
        read(optuna.create_study())
