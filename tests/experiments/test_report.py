import io
import re
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from experiments import record, report
from experiments.errors import UserError
from experiments.estimate import Estimate
from tests.experiments.browser import Browser, Scheme
from tests.experiments.pages.markup import Markup
from tests.experiments.pages.synthetic import write_run, write_sweep
from tests.experiments.synthetic import study, write


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    records = study()
    for result in records:
        result.label = "Adam, <fixed>" if result.method == "adam" else result.label
    return write(tmp_path_factory.mktemp("study"), records)


@pytest.fixture(scope="module")
def outcome(directory: Path) -> report.Shown:
    return report.remake(directory, Console(quiet=True))


@pytest.fixture(scope="module")
def page(directory: Path, outcome: report.Shown) -> Markup:
    return Markup((directory / report.FILE).read_text(encoding="utf-8"))


def test_nothing_comes_from_outside_the_file(page: Markup):
    for tag, attributes in page.tags:
        for name in ("src", "srcset", "href"):
            if (value := attributes.get(name)) is not None:
                assert value.startswith(("data:", "#")), f"{tag} {name}={value[:40]}"
        assert tag not in {"script", "iframe", "object"}  # nothing on it needs one


def test_every_number_of_every_table_is_there(page: Markup, outcome: report.Shown):
    text = " ".join(page.words)
    for table in outcome.tables:
        assert table.title in text
        for row in table.rows:
            for cell in row:
                assert (cell.text() if isinstance(cell, Estimate) else cell) in text
    assert len(page.attributes("table")) == len(outcome.tables) + 1


def test_findings_configuration_versions_and_command_are_there(page: Markup, outcome: report.Shown):
    text = "".join(page.words)
    for finding in outcome.findings:
        assert finding.sentence in text
    for expected in (
        "A short version.",
        "name: synthetic",
        "torch",
        "threads per run",
        "experiment=demo 'data.path=a b'",
    ):
        assert expected in text


def test_a_figure_for_each_colour_scheme_with_words_for_those_who_do_not_see_it(page: Markup):
    (source,), (image,) = page.attributes("source"), page.attributes("img")
    assert source["media"] == "(prefers-color-scheme: dark)"
    assert source["srcset"] != image["src"]
    assert "score" in (image["alt"] or "")


def test_landmarks_headings_and_regions_that_scroll_can_be_reached(page: Markup):
    for landmark in ("header", "main", "footer", "h1"):
        assert len(page.attributes(landmark)) == 1
    scrolling = [attributes for attributes in page.attributes("div") if "scroll" in (attributes.get("class") or "")]
    assert scrolling and all(a["tabindex"] == "0" and a["aria-label"] for a in scrolling)
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_making_it_again_changes_nothing(directory: Path, outcome: report.Shown):
    before = (directory / "report.html").read_bytes()
    report.remake(directory, Console(quiet=True))
    assert (directory / "report.html").read_bytes() == before


def test_computing_is_processor_time_where_it_was_counted(tmp_path: Path):
    records = study()
    for result in records:
        result.seconds, result.processor_seconds = 100.0, None if result.seed else 2.0
    counted = sum(not result.seed for result in records)
    report.remake(write(tmp_path, records), Console(quiet=True))
    assert report.Summary.load(tmp_path).seconds == 100.0 * (len(records) - counted) + 2.0 * counted


def test_the_figure_lies_beside_it(directory: Path, outcome: report.Shown):
    assert outcome.figure.exists() and (directory / "figure.svg").exists()


def test_the_terminal_shows_table_and_findings(directory: Path):
    console = Console(width=200, record=True, file=io.StringIO())
    made = report.remake(directory, console)
    text = console.export_text()
    assert "test accuracy" in text and "Square root" in text
    assert all(finding.bar in text for finding in made.findings)
    assert f"[{made.tables[0].rows[0][2].interval()}]" in text


def test_a_directory_without_a_study_is_a_user_error(tmp_path: Path):
    with pytest.raises(UserError, match="not the directory of a study"):
        report.remake(tmp_path, Console(quiet=True))


def test_an_unfinished_study_is_a_user_error(directory: Path, tmp_path: Path):
    copy = shutil.copytree(directory, tmp_path / "copy")
    (copy / "runs" / "3" / record.FILE).unlink()
    with pytest.raises(UserError, match=r"runs.3.*record"):
        report.remake(copy, Console(quiet=True))


@pytest.mark.parametrize("arguments", [[], ["nowhere"], ["a", "b"]])
def test_wrong_arguments_end_with_one_line(arguments: list[str], monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["report", *arguments])
    with pytest.raises(SystemExit) as end:
        report.main()
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and line.startswith("error: ") and "name" in line and "of a run" in line


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.mark.parametrize(("scheme", "background"), [("light", (255, 255, 255)), ("dark", (0x15, 0x19, 0x1E))])
@pytest.mark.parametrize("width", [360, 1000])
def test_in_a_browser(
    browser: Browser, directory: Path, outcome: report.Shown, tmp_path: Path, width: int, scheme: Scheme, background
):
    """In both colour schemes page and figure have its background, and only what is meant to scroll is wider."""
    picture = tmp_path / "page.png"
    browser.open(directory / report.FILE, width=width, scheme=scheme, height=1200)
    browser.screenshot(picture)
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    assert browser.complaints == []
    with Image.open(picture) as image:
        pixels = image.convert("RGB")
        colours = {colour: count for count, colour in pixels.getcolors(maxcolors=2**24)}
    assert pixels.getpixel((0, 0)) == background
    assert max(colours, key=colours.__getitem__) == background
    assert len(colours) > 500  # the lines of the figure, in their colours


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", ["report", *map(str, arguments)])
    report.main()


def words(path: Path) -> str:
    return Markup(path.read_text(encoding="utf-8")).text


def test_a_study_has_its_own_page_and_its_runs_have_theirs(directory: Path, tmp_path: Path, monkeypatch, capsys):
    run(monkeypatch, directory, "-o", tmp_path / "study.html")
    assert "Tested:" in words(tmp_path / "study.html")
    copy = shutil.copytree(directory / "runs", tmp_path / "runs")
    for other in list(copy.iterdir())[20:]:
        shutil.rmtree(other)
    run(monkeypatch, copy)
    assert "20 runs: 20 finished." in words(copy / report.FILE)
    assert f"report: {copy / report.FILE}" in capsys.readouterr().out


def test_several_directories_have_a_page_beside_them(tmp_path: Path, monkeypatch, capsys):
    paths = [write_run(tmp_path / "here" / name, seed=i) for i, name in enumerate("ab")]
    run(monkeypatch, *paths)
    assert "2 runs: 2 finished." in words(tmp_path / "here" / report.FILE)
    assert "1 group" not in capsys.readouterr().out
    # Not in the one that the other lies in, whose own page that would be.
    run(monkeypatch, tmp_path / "here", paths[0])
    assert words(tmp_path / report.FILE).startswith("here, a")
    run(monkeypatch, *paths, "-o", tmp_path / "new" / "page.html")
    assert (tmp_path / "new" / "page.html").exists()


def test_the_terminal_shows_where_runs_ended(tmp_path: Path):
    console = Console(width=200, record=True, file=io.StringIO())
    report.of_runs([write_sweep(tmp_path / "sweep", seeds=[0, 1])], console)
    text = console.export_text()
    assert "Adam, <fixed> · B = 16 · lr = 0.01" in text and "loss" in text
    assert "The lowest final training loss is lower" in text
