import io
import re
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from experiments import record, report
from experiments.errors import UserError
from experiments.findings import Estimate
from tests.experiments.synthetic import study, write

VOID = {"meta", "link", "source", "img", "br"}


class Page(HTMLParser):
    """Checks that tags nest, and collects what a reader gets."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    records = study()
    for result in records:
        result.label = "Adam, <fixed>" if result.method == "adam" else result.label
    return write(tmp_path_factory.mktemp("study"), records)


@pytest.fixture(scope="module")
def outcome(directory: Path) -> report.Outcome:
    return report.remake(directory, Console(quiet=True))


@pytest.fixture(scope="module")
def page(directory: Path, outcome: report.Outcome) -> Page:
    page = Page()
    page.feed((directory / "report.html").read_text(encoding="utf-8"))
    return page


def test_the_page_nests_and_closes(page: Page):
    assert page.open == []


def test_nothing_comes_from_outside_the_file(page: Page):
    for tag, attributes in page.tags:
        for name in ("src", "srcset", "href"):
            if (value := attributes.get(name)) is not None:
                assert value.startswith(("data:", "#")), f"{tag} {name}={value[:40]}"
        assert tag not in {"script", "iframe", "object"}


def test_every_number_of_every_table_is_there(page: Page, outcome: report.Outcome):
    text = " ".join(page.words)
    for table in outcome.tables:
        assert table.title in text
        for row in table.rows:
            for cell in row:
                assert (cell.text() if isinstance(cell, Estimate) else cell) in text
    assert len(page.attributes("table")) == len(outcome.tables) + 1


def test_findings_configuration_versions_and_command_are_there(page: Page, outcome: report.Outcome):
    text = "".join(page.words)
    for finding in outcome.findings:
        assert finding.sentence in text
    for expected in ("A short version.", "name: synthetic", "torch", "threads per run", "experiment=demo 'name=a b'"):
        assert expected in text


def test_a_figure_for_each_colour_scheme_with_words_for_those_who_do_not_see_it(page: Page):
    (source,), (image,) = page.attributes("source"), page.attributes("img")
    assert source["media"] == "(prefers-color-scheme: dark)"
    assert source["srcset"] != image["src"]
    assert "score" in (image["alt"] or "")


def test_landmarks_headings_and_regions_that_scroll_can_be_reached(page: Page):
    for landmark in ("header", "main", "footer", "h1"):
        assert len(page.attributes(landmark)) == 1
    scrolling = [attributes for attributes in page.attributes("div") if "scroll" in (attributes.get("class") or "")]
    assert scrolling and all(a["tabindex"] == "0" and a["aria-label"] for a in scrolling)
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_making_it_again_changes_nothing(directory: Path, outcome: report.Outcome):
    before = (directory / "report.html").read_bytes()
    report.remake(directory, Console(quiet=True))
    assert (directory / "report.html").read_bytes() == before


def test_the_figure_lies_beside_it(directory: Path, outcome: report.Outcome):
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
    assert end.value.code == 2 and line.startswith("error: ") and "the directory of a study" in line


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "background"), [(1, (255, 255, 255)), (0, (0x15, 0x19, 0x1E))])
def test_in_a_browser(directory: Path, outcome: report.Outcome, tmp_path: Path, scheme: int, background):
    """In both colour schemes page and figure have its background."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs chromium on the PATH")
    picture = tmp_path / "page.png"
    command = [
        chromium,
        *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
        *(
            "--disable-component-update",
            "--disable-sync",
            "--hide-scrollbars",
            f"--user-data-dir={tmp_path / 'profile'}",
        ),
        *(f"--blink-settings=preferredColorScheme={scheme}", "--window-size=1000,1200", f"--screenshot={picture}"),
        (directory / "report.html").as_uri(),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    with Image.open(picture) as image:
        pixels = image.convert("RGB")
        colours = {colour: count for count, colour in pixels.getcolors(maxcolors=2**24)}
    assert pixels.getpixel((0, 0)) == background
    assert max(colours, key=colours.__getitem__) == background
    assert len(colours) > 500  # the lines of the figure, in their colours
