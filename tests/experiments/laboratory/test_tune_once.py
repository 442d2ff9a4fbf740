"""Regrets against closed forms, and the findings both ways they may come out."""

from __future__ import annotations

import dataclasses
from dataclasses import asdict

import numpy as np
import pytest

from experiments.errors import UserError
from experiments.jobs import Result
from experiments.laboratory.schemas import TuneOnceConfig
from experiments.laboratory.tune_once import TuneOnce, transfer
from experiments.record import Record
from experiments.study import Outcome
from experiments.themes import DARK, LIGHT
from tests.experiments.synthetic import BATCH_SIZES, COMPARISON, SENSITIVITY, study

SETTINGS = TuneOnceConfig(
    name="tune_once",
    seeds=[0, 1, 2],
    ours=list(COMPARISON.ours),
    baselines=[method for method in SENSITIVITY if method not in COMPARISON.ours],
    reference=COMPARISON.reference,
    tuning_batch_size=COMPARISON.tuning_batch_size,
    lr_multipliers=[1.0],
    batch_sizes=list(BATCH_SIZES),
    score_batch_sizes=list(COMPARISON.score_batch_sizes),
    regret_batch_sizes=[4, 16, 64, 256],
)


def outcome(records: list[Record], **changes: object) -> Outcome:
    settings = TuneOnceConfig(**asdict(SETTINGS) | changes)
    return TuneOnce(settings).outcome([Result({}, record, 0.0) for record in records])


def test_regret_is_to_the_reference_tuned_at_each_batch_size() -> None:
    # Two methods, two learning rates, two batch sizes; one seed.
    loss = np.array([[[[1.0, 5.0], [2.0, 3.0]], [[0.9, 4.0], [3.0, 0.5]]]])
    found = transfer(loss, home=0, reference=0, averaged=[1])
    assert found.regret.tolist() == [[0.0, 2.0], [pytest.approx(-0.1), 1.0]]
    assert found.mean.tolist() == [2.0, 1.0]
    assert found.cost.tolist() == [0.0, pytest.approx(-0.1)]
    # Tuned at the second batch size, both take the second learning rate.
    assert found.tuned_at.tolist() == [[2.0, 1.0], [0.0, -2.5]]
    assert transfer(loss, home=1, reference=0, averaged=[1]).mean.tolist() == [0.0, -2.5]


def test_a_method_whose_loss_does_not_move_has_the_lowest_regret() -> None:
    records = [record for record in study() if record.method != "ours_r1"]
    found = outcome(records, ours=["ours"], baselines=["adam", "square_root", "sgd"])
    assert [finding.verdict for finding in found.findings[:4]] == ["holds"] * 2 + ["cannot be judged"] * 2
    assert "No other R was tried: Ours" in found.findings[2].sentence
    assert found.tables[0].rows[0][0] == "Ours" and found.tables[0].emphasised == (0,)


def test_a_default_that_moves_most_fails_both_bars() -> None:
    found = outcome(
        study(), ours=["adam", "ours"], baselines=["ours_r1", "square_root", "sgd"], reference="square_root"
    )
    assert [finding.verdict for finding in found.findings[:4]] == ["does not hold"] * 4
    assert "above the lowest of the others, that of Ours" in found.findings[2].sentence


def test_a_default_is_as_good_as_any_only_beyond_what_seeds_explain() -> None:
    """Two names of one method, whose losses differ by noise: the lower one has not won."""
    random = np.random.default_rng(3)

    def twin(record: Record) -> Record:
        noise = np.exp(0.05 * random.normal(size=len(record.train_loss)))
        return dataclasses.replace(record, method="ours", train_loss=(record.train_loss * noise).tolist())

    records = [r for r in study() if r.method != "ours"]
    records += [twin(r) for r in records if r.method == "ours_r1"]
    for first, second in (("ours", "ours_r1"), ("ours_r1", "ours")):
        found = outcome(records, ours=[first, second], baselines=["adam", "square_root", "sgd"])
        assert found.findings[2].verdict == "cannot be judged"
    clear = outcome(study(), ours=["ours_r1", "adam"], baselines=["ours", "square_root", "sgd"], reference="ours")
    assert clear.findings[2].verdict == "holds"


def test_one_seed_judges_nothing() -> None:
    found = outcome(study(seeds=1))
    assert [finding.verdict for finding in found.findings] == ["cannot be judged"] * 6


def test_each_loss_is_tuned_on_itself() -> None:
    """Held out, another learning rate of the reference is best, and the regret there is zero."""
    records = study()
    for record in records:
        if record.method == "adam" and record.lr == 5e-4:
            record.test_loss = [loss / 100 for loss in record.test_loss]
    training, held_out, *_ = outcome(records).tables
    row = next(row for row in training.rows if row[0] == "Adam")
    assert float(row[3].text()) == 0  # type: ignore[union-attr]  # at the tuning batch size
    row = next(row for row in held_out.rows if row[0] == "Adam")
    assert float(row[3].text()) == 0  # type: ignore[union-attr]
    assert training.rows[0][3].text() != held_out.rows[0][3].text()  # type: ignore[union-attr]


def test_a_learning_rate_that_only_small_batches_bear_is_not_found_there() -> None:
    """At the largest batch size the largest learning rate breaks, which is the best at the others."""

    def breaking(record: Record) -> Record:
        breaks = record.method == "ours" and record.lr == 2e-3
        factor = 3.0 if record.batch_size == 256 else 0.5
        losses = [loss * factor for loss in record.train_loss] if breaks else record.train_loss
        return dataclasses.replace(record, train_loss=losses)

    found = outcome([breaking(record) for record in study()])
    where, largest = found.tables[2], found.findings[4]
    assert largest.verdict == "holds" and "tuned at B = 256" in largest.bar
    ours = [cell.value for cell in where.rows[0][1:]]  # type: ignore[union-attr]
    assert ours[0] == ours[3] > ours[4]
    assert outcome(study()).findings[4].verdict == "holds"  # nothing moves, and the difference is zero


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_the_figure_has_every_method_in_each_panel(theme) -> None:
    figure = outcome(study()).draw(theme)
    for axes in figure.axes[:2]:
        assert len(axes.lines) == len(SENSITIVITY) + 1
    assert len(figure.axes[2].containers) == len(SENSITIVITY)


def test_regrets_are_averaged_over_sizes_that_run() -> None:
    with pytest.raises(UserError, match=r"study.regret_batch_sizes has \[1024\]"):
        TuneOnce(dataclasses.replace(SETTINGS, regret_batch_sizes=[4, 1024])).check()
