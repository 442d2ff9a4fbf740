"""The experiments, as conf/experiment/ has them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra.errors import ConfigCompositionException

from experiments import catalogue as module
from experiments.catalogue import catalogue, chosen, names, read, whole_of
from experiments.config import CONF, compose_config
from experiments.errors import UserError
from experiments.laboratory.schemas import STUDIES


def test_every_file_is_an_experiment_or_a_short_form_of_one() -> None:
    found = catalogue()
    told = [e.name for e in found] + [e.short.name for e in found if e.short]
    assert sorted(told) == names() and len(names()) == len(list((CONF / "experiment").rglob("*.yaml")))


def test_studies_come_in_the_order_of_their_table_and_runs_at_the_end() -> None:
    kinds = [e.config.study.name if e.config.study else None for e in catalogue()]
    order = [*STUDIES, None]
    assert kinds == sorted(kinds, key=order.index) and kinds[-1] is None


def test_another_short_form_belongs_to_what_its_defaults_begin_with() -> None:
    (invariance,) = (e for e in catalogue() if e.name == "batch_size_invariance")
    assert invariance.short is not None and invariance.short.config.study is not None
    assert invariance.short.directory != invariance.directory
    assert whole_of("demo", compose_config(["experiment=demo"])) == "batch_size_invariance"
    assert whole_of("batch_size_invariance", invariance.config) == ""
    assert whole_of("search_digits", compose_config(["experiment=search_digits"])) == ""


def test_a_form_in_the_folder_of_short_ones_has_the_name_of_the_full_one() -> None:
    assert whole_of("short/mine", compose_config(["experiment=batch_size_invariance"])) == "mine"


def test_a_study_asks_its_question_and_a_run_says_what_it_is_for() -> None:
    told = {e.name: e.question() for e in catalogue()}
    assert told["batch_size_invariance"] == (
        "Does the learning curve, against examples seen, stay when the batch size changes?"
    )
    assert told["digits"] == "One run, a few seconds: the digits with batch-size-invariant Adam."
    assert all(told.values())


def test_results_of_a_study_and_of_runs_lie_below_one_directory() -> None:
    directories = {e.name: e.directory for e in catalogue()}
    assert directories["batch_size_invariance"] == Path("outputs/batch_size_invariance")
    assert directories["digits"] == Path("outputs/digits")


def test_studies_are_chosen_by_name() -> None:
    assert [e.name for e in chosen(["batch_size_invariance"])] == ["batch_size_invariance"]
    assert {e.name for e in chosen([])} == {e.name for e in catalogue() if e.config.study}
    with pytest.raises(UserError, match="digits, dirft: no study of conf/experiment; there are .*invariance"):
        chosen(["digits", "batch_size_invariance", "dirft"])


def test_a_file_that_cannot_be_composed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(overrides: list[str]) -> None:
        raise ConfigCompositionException("no such key")

    monkeypatch.setattr(module, "compose_config", broken)
    with pytest.raises(UserError, match="conf/experiment/digits.yaml cannot be composed: no such key"):
        read("digits")
