"""What `python -m experiments.results` writes, and where."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from experiments import results
from experiments.catalogue import Experiment, catalogue, chosen
from experiments.documents import fill
from experiments.recorded import FOLDER
from experiments.results import MARKER, RESULTS, document, line
from tests.experiments.outcomes import write

NAME = "batch_size_invariance"
TEXT = "# Results\n\n<!-- results: how -->\nold\n<!-- /results -->\nend\n"


@pytest.fixture
def experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Experiment:
    """In a directory that has the document, and no results."""
    monkeypatch.chdir(tmp_path)
    RESULTS.parent.mkdir()
    RESULTS.write_text(TEXT)
    # The findings are imaginary, and no results of jobs could be analysed anew.
    monkeypatch.setattr(results.report, "remake", lambda directory, console: None)
    (found,) = chosen([NAME])
    return found


def launch(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["experiments.results", *arguments])
    try:
        results.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_a_section_says_what_was_asked_found_and_run(experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    write(experiment)
    assert launch(monkeypatch, "--collect") == 0
    text = RESULTS.read_text()
    assert text.startswith("# Results\n") and text.endswith("end\n") and "\nold" not in text
    assert f"| [{NAME}](#{NAME}) | 2 hold, 1 does not hold | 5 | full | 5 min |" in text
    _, _, told = text.partition(f"## {NAME}\n\n")
    for expected in (
        "**A title.** Is it so?",
        "Tested: A paper, section 2.",
        f"`python -m experiments.train experiment={NAME}`: 2 jobs over 5 seeds, 10 min of computing, "
        "about 5 min on 2 cores; python 3.11, machine imaginary, 2 cores.",
        f"![A curve [in words].](../docs/results/{NAME}.png)",
        "*What is seen.*",
        "- lr0 drifts by half an octave at most: **holds**. It drifts by 0.2 [0.1, 0.3] octaves over B &lt; 256.",
        r"- A note with a\_name and \*stars\*.",
    ):
        assert expected in told
    assert "> " not in told


def test_a_short_form_shows_its_note(experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    assert experiment.short is not None
    write(experiment.short)
    assert launch(monkeypatch, "--collect") == 0
    text = RESULTS.read_text()
    assert "> This is the short form of the experiment" in text and "| short |" in text
    assert "`python -m experiments.train experiment=demo`" in text


def test_sections_without_results_here_stay(experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(experiment)
    assert launch(monkeypatch, "--collect") == 0
    before = RESULTS.read_text()
    for path in folder.iterdir():
        path.unlink()
    assert launch(monkeypatch, "--collect") == 0
    assert RESULTS.read_text() == before


def test_what_has_not_run_is_in_the_table_alone(experiment: Experiment) -> None:
    text = document([experiment])
    assert f"| {NAME} | not run yet |" in text and "##" not in text


def test_studies_run_one_after_the_other_and_one_failure_stops_no_other(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []

    def run(command: list[str]) -> subprocess.CompletedProcess[str]:
        ran.append(command[-1])
        if "short" in command[-1] or "demo" in command[-1]:
            write(experiment)
            return subprocess.CompletedProcess(command, 0)
        return subprocess.CompletedProcess(command, 2)

    monkeypatch.setattr(subprocess, "run", run)
    assert launch(monkeypatch, "--short", NAME) == 0
    assert f"## {NAME}" in RESULTS.read_text()
    assert launch(monkeypatch, NAME) == 2
    assert ran == ["experiment=demo", f"experiment={NAME}"]
    assert f"error: {NAME} failed" in capsys.readouterr().err
    assert f"## {NAME}" in RESULTS.read_text()


def test_nothing_runs_where_the_results_cannot_be_written(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(subprocess, "run", lambda command: pytest.fail("it ran"))
    assert launch(monkeypatch, "nonesuch") == 2
    RESULTS.unlink()
    assert launch(monkeypatch) == 2
    assert not FOLDER.exists()
    messages = capsys.readouterr().err.splitlines()
    assert "nonesuch: no study" in messages[0] and f"there is no {RESULTS} here" in messages[1]


def test_a_short_form_does_not_take_the_place_of_a_full_one(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its time alone is told, and kept when the full form has run again."""
    assert experiment.short is not None
    folder = write(experiment)
    assert launch(monkeypatch, "--collect") == 0
    before, untimed, timed = RESULTS.read_text(), "| full | 5 min | not known |", "| full | 5 min | 40 s |"
    for path in folder.iterdir():
        path.unlink()
    short = write(experiment.short, seconds=80)
    assert launch(monkeypatch, "--collect") == 0
    assert untimed in before and RESULTS.read_text() == before.replace(untimed, timed)
    for path in short.iterdir():
        path.unlink()
    write(experiment)
    assert launch(monkeypatch, "--collect") == 0
    assert RESULTS.read_text() == before.replace(untimed, timed)


def test_the_time_of_a_recorded_short_form_is_kept(experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    assert experiment.short is not None
    short = write(experiment.short, seconds=80)
    assert launch(monkeypatch, "--collect") == 0
    assert "| short | 40 s | 40 s |" in RESULTS.read_text()
    for path in short.iterdir():
        path.unlink()
    write(experiment)
    assert launch(monkeypatch, "--collect") == 0
    assert "| full | 5 min | 40 s |" in RESULTS.read_text()


def test_signs_of_markdown_are_escaped() -> None:
    assert line("a_b *c* m~\n < d") == r"a\_b \*c\* m\~ &lt; d"


def test_the_document_is_that_of_the_recorded_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made by `make results`, and by nobody's hand."""
    monkeypatch.chdir(Path(__file__).resolve().parents[2])
    text = RESULTS.read_text()
    assert fill(text, MARKER, document([e for e in catalogue() if e.config.study]), RESULTS) == text
    assert {path.stem for path in FOLDER.glob("*.json")} <= {e.name for e in catalogue()}


def test_findings_are_made_anew_from_results_that_may_be_older(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(experiment)
    made: list[Path] = []
    monkeypatch.setattr(results.report, "remake", lambda directory, console: made.append(directory))
    assert launch(monkeypatch, "--collect", NAME) == 0
    assert made == [experiment.directory]
