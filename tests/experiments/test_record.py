from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from experiments.errors import UserError
from experiments.record import Record

RECORD = Record(
    method="adam",
    label="Adam",
    lr=0.1,
    batch_size=4,
    seed=2,
    fingerprint="abc",
    status="finished",
    examples=[0, 256],
    train_loss=[2.302585092994046, 0.1],
    test_loss=[2.4, 0.2],
    test_accuracy=[0.1, 0.975],
    seconds=1.5,
)


def test_round_trip_is_exact(tmp_path: Path) -> None:
    RECORD.save(tmp_path / "record.json")
    assert Record.load(tmp_path / "record.json") == RECORD
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]


def test_a_record_from_before_processor_time_was_counted(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text(json.dumps({k: v for k, v in dataclasses.asdict(RECORD).items() if k != "processor_seconds"}))
    assert Record.load(path) == RECORD and RECORD.processor_seconds is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"method": "adam"}', '{"colour": 1}'])
def test_what_is_not_a_record_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "record.json"
    path.write_text(text)
    with pytest.raises(UserError, match=f"{path} is not a record .* delete it"):
        Record.load(path)


def test_what_diverged_ends_where_it_began() -> None:
    assert (RECORD.final_train_loss, RECORD.final_test_loss) == (0.1, 0.2)
    diverged = dataclasses.replace(RECORD, status="diverged")
    assert (diverged.final_train_loss, diverged.final_test_loss) == (2.302585092994046, 2.4)
