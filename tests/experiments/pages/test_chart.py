from __future__ import annotations

import re

import numpy as np

from experiments.pages.appearance import distinct
from experiments.pages.chart import SIDE, Line, chart
from experiments.pages.curves import Curve
from tests.experiments.pages.markup import Markup

EXAMPLES = np.array([0.0, 1.0, 10.0, 100.0])


def line(mean: list[float], band: float = 0.0, label: str = "a <b>") -> Line:
    values = np.array(mean)
    return Line("g0", label, Curve(EXAMPLES[: len(mean)], values, values - band, values + band), distinct(1)[0])


def paths(markup: str, x: str, y: str) -> list[str]:
    plot = re.search(rf'data-x="{x}" data-y="{y}".*?</svg>', markup, re.DOTALL)
    assert plot is not None
    return re.findall(r'<path class="(?:line|band)" d="([^"]*)"', plot[0])


def test_a_curve_lies_where_its_values_are() -> None:
    drawn = chart("loss", "loss", [line([100.0, 10.0, 1.0, 0.1])], "log")
    (path,) = paths(drawn, "log", "log")
    points = [tuple(map(int, point.split())) for point in path[1:].split("L")]
    # No logarithm of 0 examples; the vertical axis has a margin of a twentieth of three decades.
    assert [x for x, _ in points] == [0, SIDE / 2, SIDE]
    assert [y for _, y in points] == [round(SIDE * (1 - (3.15 - i) / 3.3)) for i in (1, 2, 3)]
    (path,) = paths(drawn, "linear", "log")
    assert path.startswith("M0 ") and path.count("L") == 3


def test_only_scales_that_have_a_place_for_the_values() -> None:
    assert {y for _, y in axes(chart("a", "a", [line([1.0, -1.0, 2.0])], "log"))} == {"linear"}
    assert axes(chart("a", "a", [line([1.0, 2.0, 3.0])], "log")) == [
        ("log", "log"),
        ("log", "linear"),
        ("linear", "log"),
        ("linear", "linear"),
    ]
    assert "nothing to draw" in chart("a", "a", [line([float("nan")])], "log")


def axes(drawn: str) -> list[tuple[str, str]]:
    return re.findall(r'data-x="(\w+)" data-y="(\w+)"', drawn)


def test_what_explodes_is_cut_off() -> None:
    """Else it would leave one line to all that does not."""
    lines = [line([2.0, 1.0, 0.5, 0.5]), line([2.0, 1e6, 1e9, 1e300])]
    calm, exploded = paths(chart("a", "a", lines, "log", ceiling=4.0), "linear", "linear")
    heights = [[int(point.split()[1]) for point in path[1:].split("L")] for path in (calm, exploded)]
    assert heights[0] == [round(SIDE * (1 - (value - 0.325) / 3.85)) for value in (2.0, 1.0, 0.5, 0.5)]
    assert max(heights[1][1:]) < 0 and min(heights[1]) > -1e7  # above the drawing


def test_one_plot_is_shown_and_the_metric_chooses_it() -> None:
    """The script can choose another; without it that one stays."""
    for scale in ("log", "linear"):
        plots = [a for a in Markup(chart("a", "a", [line([1.0, 2.0])], scale)).attributes("div") if "data-y" in a]
        (shown,) = [plot for plot in plots if "hidden" not in plot]
        assert (shown["data-x"], shown["data-y"]) == ("log", scale)


def test_a_band_where_seeds_differ() -> None:
    assert len(paths(chart("a", "a", [line([1.0, 2.0])], "log"), "log", "linear")) == 1
    band, mean = paths(chart("a", "a", [line([1.0, 2.0, 3.0], band=0.5)], "log"), "linear", "linear")
    assert band.endswith("Z") and band.count("L") == 2 * mean.count("L") + 1
    # What has no logarithm is at the edge.
    low, _ = paths(chart("a", "a", [line([1.0, 2.0, 3.0], band=1.0)], "log"), "linear", "log")
    assert f" {SIDE}Z" in low and "nan" not in low


def test_the_legend_names_the_group_and_its_last_value() -> None:
    markup = Markup(chart("loss", "loss (nats)", [line([3.0, 2.0], band=0.5), line([4.0], label="other")], "log"))
    assert "a <b>" in markup.text and "2 (1.5 to 2.5)" in markup.text and "other 4" in markup.text
    assert [button["data-group"] for button in markup.attributes("button")] == ["g0", "g0"]
    assert all("2 curves" in (svg["aria-label"] or "") for svg in markup.attributes("svg") if "role" in svg)
