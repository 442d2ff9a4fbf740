"""The page as it is used: by eye, by pointer and by keyboard, on a telephone and on a desk, by day and by night."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from experiments.pages import collection
from tests.experiments.browser import Browser, Scheme
from tests.experiments.pages.synthetic import collected, write_sweep

BACKGROUND = {"light": (255, 255, 255), "dark": (0x15, 0x19, 0x1E)}

CHOOSE = "m = document.querySelector('#metric'), m.value = '{}', m.dispatchEvent(new Event('change')), 0"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    sweep = write_sweep(folder / "sweep")
    path = folder / "report.html"
    path.write_text(collection.page(collected(sweep), [sweep]), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


def shown(browser: Browser) -> list[list[str]]:
    """Name and axes of each plot of the curves that can be seen."""
    found: list[list[str]] = browser.evaluate(
        "[...document.querySelectorAll('section:first-of-type .plot')].filter(p => p.offsetHeight)"
        ".map(p => [p.parentElement.dataset.name, p.dataset.x, p.dataset.y])"
    )
    return found


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1000])
def test_looks(browser: Browser, page: Path, tmp_path: Path, width: int, scheme: Scheme) -> None:
    """Nothing but what is meant to scroll is wider than the screen, and nothing complains."""
    browser.open(page, width=width, scheme=scheme)
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    wider = browser.evaluate(
        "[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll, svg') && "
        f"e.getBoundingClientRect().right > {width} + 1).map(e => e.outerHTML.slice(0, 80))"
    )
    assert wider == []
    smallest = browser.evaluate(
        "Math.min(...[...document.querySelectorAll('p, span, td, th, button, code')].filter(e => e.offsetHeight)"
        ".map(e => parseFloat(getComputedStyle(e).fontSize)))"
    )
    assert smallest >= 12
    browser.screenshot(tmp_path / "page.png")
    with Image.open(tmp_path / "page.png") as image:
        pixels = image.convert("RGB")
    colours = {colour: count for count, colour in pixels.getcolors(maxcolors=2**24)}
    assert max(colours, key=colours.__getitem__) == BACKGROUND[scheme]
    assert len(colours) > 500  # the curves are there, in theirs
    assert browser.complaints == []


def test_metric_and_axes_are_chosen(browser: Browser, page: Path) -> None:
    browser.open(page, width=1000, scheme="light")
    assert shown(browser) == [["loss/train", "log", "log"]]
    browser.evaluate(CHOOSE.format("accuracy/test"))
    assert shown(browser) == [["accuracy/test", "log", "linear"]]  # as it is read first
    browser.evaluate("document.querySelector('[data-axis=x][data-scale=linear]').click()")
    browser.evaluate("document.querySelector('[data-axis=y][data-scale=log]').click()")
    assert shown(browser) == [["accuracy/test", "linear", "log"]]
    browser.evaluate(CHOOSE.format("loss/test"))
    assert shown(browser) == [["loss/test", "linear", "log"]]  # what was chosen stays
    pressed = "[...document.querySelectorAll('[data-axis][aria-pressed=true]')].map(b => b.dataset.scale)"
    assert browser.evaluate(pressed) == ["log", "linear"]
    assert browser.complaints == []


def test_pointing_at_a_curve_brings_out_its_group(browser: Browser, page: Path) -> None:
    browser.open(page, width=1000, scheme="light")
    ends = browser.evaluate(
        "[...document.querySelectorAll('.chart:not([hidden]) .plot:not([hidden]) .line')].map(p => "
        "{ const q = p.getPointAtLength(p.getTotalLength()).matrixTransform(p.getScreenCTM());"
        " return [q.x - 1, q.y]; })"
    )
    x, y = min(ends[:18], key=lambda end: end[1])
    browser.move(x, y - 4)  # beside the uppermost line: a hand is not that exact
    on = browser.evaluate("[...new Set([...document.querySelectorAll('.on')].map(e => e.dataset.group))]")
    assert len(on) == 1
    label = browser.evaluate("document.querySelector('.legend .on .name').textContent")
    readout = browser.evaluate("document.querySelector('.readout').textContent")
    assert label and label in readout and "(" in readout  # with its final value and band
    plot = "[...document.querySelectorAll('.chart:not([hidden])[data-crowded] .plot:not([hidden]) .band')]"
    seen = f"{plot}.filter(b => getComputedStyle(b).opacity > 0).map(b => b.parentElement.dataset.group)"
    assert browser.evaluate(seen) == on  # of eighteen, one
    browser.move(5, 5)
    assert browser.evaluate("document.querySelectorAll('.on, .focusing').length") == 0


def test_every_control_and_region_is_reached_by_keyboard_and_left_again(browser: Browser, page: Path) -> None:
    browser.open(page, width=360, scheme="dark")
    browser.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true })")
    wanted = browser.evaluate(
        "[...document.querySelectorAll('select, button, summary, [tabindex]')]"
        ".filter(e => e.offsetHeight && !e.disabled).map((e, i) => (e.dataset.order = i))"
    )
    reached, outlines = [], set()
    for _ in wanted:
        browser.press("Tab", 9)
        reached.append(browser.evaluate("Number(document.activeElement.dataset.order)"))
        outlines.add(browser.evaluate("getComputedStyle(document.activeElement).outlineStyle"))
    assert reached == wanted and len(wanted) > 30 and outlines == {"solid"}
    browser.press("Tab", 9)
    assert browser.evaluate("document.activeElement.dataset.order ?? null") in (None, "0")  # no trap at the end


def test_a_group_is_kept_by_keyboard(browser: Browser, page: Path) -> None:
    browser.open(page, width=1000, scheme="dark")
    on = "[...new Set([...document.querySelectorAll('.on')].map(e => e.dataset.group))]"
    button = "document.querySelector('.chart[data-name=\"{}\"] button[data-group=g3]')"
    browser.evaluate(f"{button.format('loss/train')}.focus()")
    assert browser.evaluate(on) == ["g3"]
    browser.press("Enter", 13, "\r")
    browser.evaluate(f"{button.format('loss/train')}.blur()")
    browser.evaluate(CHOOSE.format("loss/test"))
    assert browser.evaluate(on) == ["g3"]
    assert browser.evaluate(f"{button.format('loss/test')}.ariaPressed") == "true"
    browser.evaluate(f"{button.format('loss/test')}.focus()")
    browser.press("Enter", 13, "\r")
    browser.evaluate(f"{button.format('loss/test')}.blur()")
    assert browser.evaluate(on) == []


def test_everything_can_be_read_without_script(browser: Browser, page: Path) -> None:
    browser("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(page, width=1000, scheme="light")
        assert [name for name, *_ in shown(browser)] == [
            "loss/train",
            "loss/test",
            "accuracy/test",
            "gradient/noise_scale",
        ]
        assert browser.evaluate("document.querySelector('.controls').offsetHeight") == 0
    finally:
        browser("Emulation.setScriptExecutionDisabled", value=False)
