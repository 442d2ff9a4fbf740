"""What is kept of finished studies."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from experiments.catalogue import Experiment, chosen
from experiments.description import FILE, OUTCOME
from experiments.errors import UserError
from experiments.recorded import FOLDER, duration, essential, figure_of, finished, recorded
from tests.experiments.outcomes import FINDINGS, write

NAME = "batch_size_invariance"


@pytest.fixture
def experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Experiment:
    monkeypatch.chdir(tmp_path)
    (found,) = chosen([NAME])
    return found


def test_the_full_form_wins_over_the_short_one(experiment: Experiment) -> None:
    assert experiment.short is not None
    assert finished(experiment) is None
    write(experiment.short, seconds=10)
    short = finished(experiment)
    assert short is not None and (short.form, short.seeds, short.seconds) == ("short", 2, 5.0)
    assert figure_of(experiment, "short").read_bytes() == b"picture of demo"
    write(experiment, seconds=100)
    full = finished(experiment)
    assert full is not None and (full.form, full.summary.seconds) == ("full", 100)
    assert (full.seconds_of("full"), full.seconds_of("short"), short.seconds_of("full")) == (50.0, 5.0, None)
    assert figure_of(experiment, "full").read_bytes() == f"picture of {NAME}".encode()


@pytest.mark.parametrize(
    "change",
    [lambda told: told | {"jobs": told["jobs"][:1]}, lambda told: told | {"command": "another"}],
    ids=["jobs", "command"],
)
def test_a_study_that_runs_again_is_not_finished(
    experiment: Experiment, change: Callable[[dict[str, object]], dict[str, object]]
) -> None:
    path = write(experiment) / FILE
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    assert finished(experiment) is None


@pytest.mark.parametrize(("value", "expected"), [("example", True), ("token", False)])
def test_results_from_before_an_option_have_its_default(experiment: Experiment, value: str, expected: bool) -> None:
    path = write(experiment) / FILE
    told = json.loads(path.read_text())
    del told["config"]["engine"]["probes"]
    told["config"]["engine"]["granularity"] = value
    path.write_text(json.dumps(told))
    assert (finished(experiment) is not None) == expected


def test_what_is_saved_is_read_again(experiment: Experiment) -> None:
    write(experiment)
    found = finished(experiment)
    assert found is not None and recorded(NAME) is None
    found.save(NAME, figure_of(experiment, found.form))
    assert recorded(NAME) == found and found.summary.findings == FINDINGS
    assert (FOLDER / f"{NAME}.png").read_bytes() == f"picture of {NAME}".encode()


def test_damage_is_one_message(experiment: Experiment) -> None:
    FOLDER.mkdir(parents=True)
    for text in ("{", "{}", "[]", '{"summary": {"findings": []}}'):
        (FOLDER / f"{NAME}.json").write_text(text)
        with pytest.raises(UserError, match=f"docs/results/{NAME}.json is damaged .*: delete it"):
            recorded(NAME)
    (write(experiment) / OUTCOME).write_text("{")
    with pytest.raises(UserError, match="holds no finished study"):
        finished(experiment)


def test_times_are_told_in_one_unit() -> None:
    assert [duration(s) for s in (4.4, 99, 121, 5990, 7200)] == ["4 s", "99 s", "2 min", "100 min", "2.0 h"]
    assert duration(None) == "not known"


def test_overrides_that_decide_no_number_are_not_told() -> None:
    command = "python -m experiments.train experiment=demo directory=/x tracker.mode=online 'name=a b' study.workers=1"
    assert essential(command) == "python -m experiments.train experiment=demo"
    assert essential(f"{command} study.seeds=[0]").endswith("experiment=demo 'study.seeds=[0]'")


def test_a_study_with_overrides_is_another_experiment(experiment: Experiment) -> None:
    directory = write(experiment)
    assert finished(experiment) is not None
    described = json.loads((directory / FILE).read_text())
    described["config"]["study"]["seeds"] = [0, 1]
    (directory / FILE).write_text(json.dumps(described))
    assert finished(experiment) is None
    described["config"]["study"] |= {"seeds": [0, 1, 2, 3, 4], "workers": 7}
    (directory / FILE).write_text(json.dumps(described))
    assert finished(experiment) is not None
