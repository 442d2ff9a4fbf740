"""What `python -m experiments.readme` writes, and where."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments import readme
from tests.experiments.synthetic import study, write

TEXT = "# Title\n\n<!-- results: how -->\nold results\n<!-- /results -->\n\nThe end.\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a README and a study of two seeds."""
    monkeypatch.chdir(tmp_path)
    Path("README.md").write_text(TEXT)
    write(Path("study"), study(seeds=2))
    return tmp_path


def launch(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["experiments.readme", *arguments])
    try:
        readme.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_results_stand_between_the_markers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch(monkeypatch, "study") == 0
    text = Path("README.md").read_text()
    before, _, after = TEXT.partition("old results\n")
    assert text.startswith(before) and text.endswith(after) and "old results" not in text
    for expected in (
        "experiment=demo 'data.path=a b'`, 250 runs;",
        ": **holds**. ",
        "| **Ours** | 0.001 | ",
        "| Adam |",
    ):
        assert expected in text
    assert Path("docs/batch_size_invariance.png").read_bytes() == Path("study/figure.png").read_bytes()
    assert launch(monkeypatch, "study") == 0
    assert Path("README.md").read_text() == text


@pytest.mark.parametrize(
    ("arguments", "readme_text", "message"),
    [
        ([], TEXT, "name the directory of a study: python -m experiments.readme"),
        (["nowhere"], TEXT, "nowhere is not the directory of a study"),
        (["study"], "# Title\n", "README.md has no lines '<!-- results: ... -->'"),
        (["study"], None, "there is no README.md here"),
    ],
)
def test_what_is_missing_is_one_message(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    readme_text: str | None,
    message: str,
) -> None:
    Path("README.md").unlink() if readme_text is None else Path("README.md").write_text(readme_text)
    assert launch(monkeypatch, *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
    assert not Path("docs").exists()
    assert readme_text is None or Path("README.md").read_text() == readme_text
