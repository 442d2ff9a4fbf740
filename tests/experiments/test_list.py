"""What `python -m experiments.list` prints."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from experiments import list as module
from experiments.catalogue import SHORT, Experiment, catalogue, chosen, names
from experiments.estimate import Finding
from experiments.list import last_finding, lines, markdown
from experiments.record import FILE, Record
from experiments.recorded import figure_of, finished
from tests.experiments.outcomes import FINDINGS, write

NAME = "batch_size_invariance"


@pytest.fixture
def experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Experiment:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    (found,) = chosen([NAME])
    return found


def launch(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    monkeypatch.setattr("sys.argv", ["experiments.list", *arguments])
    module.main()
    return capsys.readouterr().out


def row(text: str, name: str) -> str:
    """What a document's table says of an experiment."""
    (found,) = (line for line in text.splitlines() if line.startswith(f"| `{name}`"))
    return found


def test_the_terminal_shows_all_in_80_columns(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert experiment.short is not None
    write(experiment, seconds=600)
    write(experiment.short, seconds=60)
    out = launch(monkeypatch, capsys)
    assert max(map(len, out.splitlines())) <= 80
    assert set(out.split()) >= {name for name in names() if not name.startswith(SHORT)}
    told = " ".join(out.split())
    assert "short: demo" in told
    assert "5 min" in told and "short: 30 s" in told and "not run yet" in told
    assert "python -m experiments.train experiment=NAME" in told


def test_times_and_findings_are_the_newest_here_and_else_the_recorded_ones(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert experiment.short is not None
    write(experiment.short, seconds=60)
    found = finished(experiment)
    assert found is not None
    found.save(NAME, figure_of(experiment, found.form))
    printed = row(launch(monkeypatch, capsys, "--markdown"), NAME)
    assert "| not run yet | 30 s |" in printed and "half an octave at most: holds (2 hold, 1 does not hold)" in printed
    write(experiment.short, seconds=80)
    assert "short: 40 s" in launch(monkeypatch, capsys)
    write(experiment, seconds=600, findings=[Finding("now", "does not hold", "")])
    assert row(launch(monkeypatch, capsys, "--markdown"), NAME) == printed
    out = launch(monkeypatch, capsys)
    assert "5 min" in out and "now: does not hold" in out and "half an octave" not in out


def test_of_single_runs_the_newest_is_told(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for i, loss in enumerate((0.5, 0.25)):
        directory = Path(f"outputs/digits/{i}")
        directory.mkdir(parents=True)
        losses = {"train_loss": [2.0, loss], "test_loss": [2.0, 2 * loss], "test_accuracy": [0.1, 0.9]}
        Record("adam", "Adam", 1e-3, 16, 0, "x", "finished", [0, 256], **losses, seconds=3.0).save(directory / FILE)
        os.utime(directory / FILE, (i, i))
    diverged = Path("outputs/digits/2")
    diverged.mkdir()
    Record("adam", "Adam", 1e-3, 16, 0, "x", "diverged").save(diverged / FILE)
    out = " ".join(launch(monkeypatch, capsys).split())
    assert "training loss 0.2500, test loss 0.5000, Adam" in out and "3 s" in out and "0.5000, test" not in out


def test_a_document_is_written_between_its_markers(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("page.md").write_text("a\n<!-- experiments: how -->\n<!-- /experiments -->\nb\n")
    assert launch(monkeypatch, capsys, "--markdown", "page.md") == ""
    text = Path("page.md").read_text()
    assert text.startswith("a\n") and text.endswith("b\n") and row(text, NAME)
    Path("page.md").write_text("")
    with pytest.raises(SystemExit) as end:
        launch(monkeypatch, capsys, "--markdown", "page.md")
    assert end.value.code == 2 and "error: page.md has no lines" in capsys.readouterr().err


def test_the_last_finding_is_the_main_claim() -> None:
    assert last_finding(FINDINGS) == "lr0 drifts by half an octave at most: holds (2 hold, 1 does not hold)"
    assert last_finding(FINDINGS[1:2]) == "a bar: does not hold"
    assert last_finding(FINDINGS[3:]) == FINDINGS[3].sentence
    assert last_finding([]) == ""


def test_the_documentation_has_every_experiment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).resolve().parents[2])
    page = Path("docs/experiments.md")
    assert markdown(lines(catalogue(), local=False)) in page.read_text(), (
        f"python -m experiments.list --markdown {page}"
    )
