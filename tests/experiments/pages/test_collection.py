from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest

from experiments import history
from experiments.pages import collection
from experiments.pages.appearance import MOST
from tests.experiments.pages.markup import Markup
from tests.experiments.pages.synthetic import collected, write_run, write_sweep


def made(*paths: Path) -> Markup:
    return Markup(collection.page(collected(*paths), paths))


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sweep(tmp_path_factory.mktemp("pages") / "a sweep")


@pytest.fixture(scope="module")
def page(sweep: Path) -> Markup:
    return made(sweep)


def test_nothing_comes_from_outside_the_file(page: Markup) -> None:
    for tag, attributes in page.tags:
        for name in ("src", "srcset", "href"):
            if (value := attributes.get(name)) is not None:
                assert value.startswith(("data:", "#")), f"{tag} {name}={value[:40]}"
        assert tag not in {"iframe", "object"}
    assert not re.search(r"https?://|@import|url\(", " ".join(page.code))


def test_sections_in_their_order(page: Markup) -> None:
    sections = [section["aria-labelledby"] for section in page.attributes("section")]
    assert sections == [
        "curves",
        "findings",
        "groups",
        "over-batch-sizes",
        "heat-maps",
        "layers",
        "configuration-and-versions",
        "look-further",
    ]
    identifiers = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(set(identifiers)) == len(identifiers) and set(sections) <= set(identifiers)
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels.count(1) == 1 and all(after <= before + 1 for before, after in pairwise(levels))


def test_what_it_says_of_the_runs(page: Markup, sweep: Path) -> None:
    assert "54 runs: 54 finished." in page.text and "18 groups, told apart by optimizer.label" in page.text
    for expected in ("Adam, <fixed> · B = 4 · lr = 0.005", "train.epochs: 24", "Abacus", "a sweep/0 # finished"):
        assert expected in page.text
    assert f"python -m experiments.report '{sweep}'" in page.text


def test_every_metric_has_a_chart_that_can_be_chosen(page: Markup) -> None:
    options = [option["value"] for option in page.attributes("option")]
    charts = [figure["data-name"] for figure in page.attributes("figure")]
    assert options == ["loss/train", "loss/test", "accuracy/test", "gradient/noise_scale"] == charts[:4]
    # Without the script all of them are seen, one below the other.
    assert not any("hidden" in figure for figure in page.attributes("figure"))
    assert len(charts[4:]) == collection.MOST_CHARTS and "Of 18 groups that logged it" in page.text


def test_one_run(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "run")
    (directory / "wandb").mkdir()
    page = made(directory)
    assert "One run, finished." in page.text and "band" not in page.text
    assert f"wandb leet {directory}/wandb" in page.text
    assert "findings" not in [section["aria-labelledby"] for section in page.attributes("section")]


def test_a_run_that_goes_on(tmp_path: Path) -> None:
    page = made(write_run(tmp_path / "run", status="unfinished"))
    assert "One run, unfinished." in page.text and "resume=true directory=" in page.text


def test_runs_that_have_logged_nothing_yet(tmp_path: Path) -> None:
    (tmp_path / "history.jsonl").touch()
    assert "The runs have logged nothing yet." in made(tmp_path).text


def test_many_groups_stay_readable(tmp_path: Path) -> None:
    """The best are drawn, and what is not is said."""
    for i in range(MOST + 16):
        write_run(tmp_path / str(i), lr=0.001 * (i + 1))
    found = collected(tmp_path)
    text = collection.page(found, [tmp_path])
    page = Markup(text)
    legends = [button for button in page.attributes("button") if (button.get("data-group") or "").startswith("g")]
    assert len(legends) == MOST * 4
    assert (
        f"Drawn are the {MOST} groups with the lowest final training loss; the 16 others are in the tables" in page.text
    )
    assert "the band is shown of the one that is pointed at" in page.text
    assert collection.drawn(found)[0].settings["optimizer.lr"] > 0.001  # not simply the first ones
    assert len([row for row in page.attributes("tr") if "data-group" in row]) == 2 * (MOST + 16)


def test_losses_that_explode_are_cut_off_and_said_to_be(tmp_path: Path, page: Markup) -> None:
    assert "cut off" not in page.text
    write_run(tmp_path / "calm", lr=0.01)
    wild = write_run(tmp_path / "wild", lr=0.02, status="unfinished")
    with (wild / history.FILE).open("a") as file:
        file.write('{"examples_seen":65536,"loss/train":1e9}\n')
    assert "Losses above 2 times the initial model's are cut off." in made(tmp_path).text
