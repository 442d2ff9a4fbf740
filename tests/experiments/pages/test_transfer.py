from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from experiments.estimate import Estimate
from experiments.pages.transfer import transfer
from tests.experiments.pages.synthetic import collected, loss, write_run, write_sweep


def test_score_and_regret_against_closed_forms(tmp_path: Path) -> None:
    found = transfer(collected(write_sweep(tmp_path)))
    assert found is not None and found.table is not None
    rows = {str(row[0]): dict(zip(found.table.columns, row, strict=True)) for row in found.table.rows}
    adam, ours = rows["Adam, <fixed>"], rows["ours"]
    assert adam["tuned lr"] == ours["tuned lr"] == "0.01"
    score, regret = ours["score"], adam["regret at B = 64"]
    assert isinstance(score, Estimate) and isinstance(regret, Estimate)
    assert score.value == pytest.approx(0, abs=1e-12) and regret.value == 0  # Adam's tuned lr is the same at every B
    expected = np.mean(
        [loss("batch_invariant_adam", 0.01, 64, s)[-1] - loss("adam", 0.01, 64, s)[-1] for s in range(3)]
    )
    beside = ours["regret at B = 64"]
    assert isinstance(beside, Estimate) and beside.value == pytest.approx(expected)
    assert beside.low < beside.value < beside.high and "final loss at B = 16" in found.table.columns
    assert "minus that of Adam, <fixed>, whose learning rate is tuned" in found.table.explanation


def test_one_seed_has_no_interval_and_one_rate_is_not_tuned(tmp_path: Path) -> None:
    found = transfer(collected(write_sweep(tmp_path, rates=[0.01], seeds=[0])))
    assert found is not None and found.table is not None
    score = found.table.rows[0][2]
    assert isinstance(score, Estimate) and np.isfinite(score.value) and np.isnan([score.low, score.high]).all()
    assert "tuned at" not in found.table.explanation and "bootstrap" not in found.table.explanation
    assert "Between seeds" not in found.table.explanation


def test_methods_are_optimizers_with_all_their_settings_but_the_rate(tmp_path: Path) -> None:
    for i, (eps, size) in enumerate(((1e-8, 4), (1e-8, 16), (1e-3, 4), (1e-3, 16))):
        write_run(tmp_path / str(i), batch_size=size, optimizer__eps=eps)
    found = transfer(collected(tmp_path))
    assert found is not None and found.table is not None
    assert [row[0] for row in found.table.rows] == ["eps = 1e-08", "eps = 0.001"]


def test_one_batch_size_has_no_section(tmp_path: Path) -> None:
    assert transfer(collected(write_sweep(tmp_path, batch_sizes=[16]))) is None


def test_why_there_is_no_table(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path / "sweep", methods=["adam"], seeds=[0])
    write_run(tmp_path / "hole", lr=0.01, batch_size=16, seed=1)
    holes = transfer(collected(tmp_path))
    assert holes is not None and "have no record" in holes.reason
    write_run(tmp_path / "other", batch_size=4, train__epochs=3)
    others = transfer(collected(tmp_path))
    assert others is not None and others.table is None and "also differ in train.epochs" in others.reason
    write_run(tmp_path / "stopped" / "0", status="unfinished", batch_size=256)
    stopped = transfer(collected(sweep, tmp_path / "stopped"))
    assert stopped is not None and stopped.reason == "1 of the runs have not ended"
