from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path

import pytest

from experiments.config import compose_config
from experiments.contest.plan import bracket, contestant, tuned_octave
from experiments.errors import UserError
from experiments.jobs import Result
from experiments.laboratory.micro_batch import MicroBatch
from experiments.launch import run_study
from experiments.record import Record
from experiments.report import Summary
from tests.experiments.contests import results, settings


def test_octaves_go_on_until_the_best_has_neighbours():
    assert bracket([-1, 0, 1], {}) == [-1, 0, 1]
    assert bracket([-1, 0, 1], {-1: [0.3], 0: [0.2], 1: [0.1]}) == [-1, 0, 1, 2]
    assert bracket([-1, 0, 1], {-1: [0.1], 0: [0.2], 1: [0.3]}) == [-2, -1, 0, 1]
    assert bracket([-1, 0, 1], {-1: [0.3], 0: [0.1], 1: [0.2]}) == [-1, 0, 1]
    assert bracket([-1, 0, 1], {-1: [0.3], 0: [0.2], 1: [0.1], 3: [0.2]}) == [-1, 0, 1, 2, 3]  # 3 is no neighbour
    assert bracket([5, 5.5, 6], {5: [3], 5.5: [2], 6: [1]}) == [5, 5.5, 6]  # as far as it goes


def test_the_tuned_octave_has_neighbours():
    assert tuned_octave([-1, 0, 1], {}) is None
    assert tuned_octave([-1, 0, 1], {-1: [0.3], 0: [0.2], 1: [0.1]}) is None
    assert tuned_octave([-1, 0, 1], {0: [0.2], 1: [0.1], 2: [0.3]}) == 1


def test_all_are_tuned_alike_and_take_turns(tmp_path: Path):
    config = dataclasses.replace(compose_config(["experiment=short/micro_batch"]), directory=str(tmp_path))
    study = MicroBatch(settings("micro_batch"))
    first = study.jobs(config, [])
    labels = list(study.settings.contestants)
    assert [job.coordinates["contestant"] for job in first[:6:2]] == labels
    known = [
        Result(job.coordinates, record_like(job.coordinates["octave"], job.coordinates["contestant"] == labels[0]), 1.0)
        for job in first
    ]
    more = [job.coordinates for job in study.jobs(config, known) if job.directory not in {j.directory for j in first}]
    assert {(c["contestant"], c["octave"]) for c in more} == {(labels[0], 2.0)}
    assert len(more) == len(study.settings.batch_sizes) * len(study.settings.seeds)


@cache
def any_record() -> Record:
    found = results(settings("micro_batch"), lambda *_: 1.0)[0].found
    assert isinstance(found, Record)
    return found


def record_like(octave: object, rising: bool):
    assert isinstance(octave, float)
    return dataclasses.replace(any_record(), train_loss=[2.0, 1.0 - 0.3 * octave * rising + 0.1 * abs(octave)])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [(("data=digits",), "differ in optimizer and engine only"), (("optimizer=none_such",), "cannot be composed")],
)
def test_what_is_no_contestant(overrides: tuple[str, ...], message: str):
    with pytest.raises(UserError, match=message):
        contestant("it", overrides)


def test_settings_that_do_not_fit():
    study = settings("micro_batch")
    with pytest.raises(UserError, match="octaves"):
        MicroBatch(dataclasses.replace(study, octaves=[0, 1])).check()
    some = {label: given for label, given in study.contestants.items() if label != "examples, R = 1"}
    with pytest.raises(UserError, match="lacks examples, R = 1"):
        MicroBatch(dataclasses.replace(study, contestants=some)).check()


def test_from_the_configuration_to_the_report(tmp_path: Path):
    config = compose_config(["experiment=short/micro_batch", "tracker=none", "train.epochs=0.2"])
    assert config.study is not None
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, warmup_examples=0))
    small = dataclasses.replace(config.study, seeds=[0], batch_sizes=[128], workers=1)
    run_study(dataclasses.replace(config, study=small), tmp_path)
    assert len(Summary.load(tmp_path).findings) >= 3


def test_octaves_go_on_for_every_criterion(tmp_path: Path):
    class ByTestLoss(MicroBatch):
        def criteria(self, record: Record) -> list[float]:
            return [*super().criteria(record), record.final_test_loss]

    config = dataclasses.replace(compose_config(["experiment=short/micro_batch"]), directory=str(tmp_path))
    study = ByTestLoss(settings("micro_batch"))
    known = []
    for job in study.jobs(config, []):
        octave = job.coordinates["octave"]
        assert isinstance(octave, float)
        record = dataclasses.replace(record_like(octave, True), test_loss=[2.0, 2.0 + octave])
        known.append(Result(job.coordinates, record, 1.0))
    assert {job.coordinates["octave"] for job in study.jobs(config, known)} == {-2.0, -1.0, 0.0, 1.0, 2.0}


def test_what_cannot_be_had_asks_for_nothing_more():
    assert bracket([-1, 0, 1], {octave: [float("inf")] for octave in (-1, 0, 1)}) == [-1, 0, 1]
