from __future__ import annotations

import math

from experiments.documents import Table
from experiments.estimate import Estimate, Finding
from experiments.pages import html
from tests.experiments.pages.markup import Markup

TABLE = Table(
    "Losses & more",
    "What it shows.",
    ["method", "loss"],
    [["<ours>", Estimate(0.5, 0.25, 0.75)], ["one seed", Estimate(0.5, math.nan, math.nan)], ["text", "4 of 5"]],
    (0,),
)


def test_a_table() -> None:
    markup = Markup(html.table(TABLE, ["g0", "g1", "g2"]))
    rows = [row for row in markup.attributes("tr") if "data-group" in row]
    assert [row["data-group"] for row in rows] == ["g0", "g1", "g2"] and rows[0]["class"] == "ours"
    assert "<ours> 0.500 [0.250, 0.750] one seed 0.500 text 4 of 5" in markup.text
    (region,) = markup.attributes("div")
    assert region == {"class": "scroll ", "tabindex": "0", "role": "region", "aria-label": "Losses & more"}


def test_a_long_table_scrolls_within_the_screen() -> None:
    long = Table("t", "", ["a", "b"], [[str(i), "x"] for i in range(html.LONG + 1)], ())
    assert [d["class"] for d in Markup(html.table(long)).attributes("div")] == ["scroll long"]


def test_findings_with_and_without_a_verdict() -> None:
    text = html.findings([Finding("A < B", "cannot be judged", "By 3."), Finding("", None, "A note.")])
    markup = Markup(text)
    assert "A < B: cannot be judged By 3. A note." in markup.text
    assert [span["class"] for span in markup.attributes("span")] == ["cannot-be-judged"]


def test_misses_come_before_what_holds_after_their_count() -> None:
    found = [
        Finding("A", "holds", "1."),
        Finding("", None, "A note."),
        Finding("B", "cannot be judged", "2."),
        Finding("C", "does not hold", "3."),
        Finding("D", "holds", "4."),
    ]
    told = Markup(html.findings(found)).text
    assert told == (
        "Of 4 claims 2 hold, 1 does not hold, 1 cannot be judged. "
        "C: does not hold 3. B: cannot be judged 2. A: holds 1. D: holds 4. A note."
    )


def test_a_page_has_a_script_only_where_it_has_a_chart() -> None:
    def page(body: str) -> str:
        return html.page(title="A & B", introduction="", body=body, footer="end")

    assert Markup(page("<p>text</p>")).attributes("script") == []
    with_chart = page(f"{html.CHART}></figure>")
    assert len(Markup(with_chart).attributes("script")) == 1 and "<title>A &amp; B</title>" in with_chart


def test_what_is_empty_is_not_there() -> None:
    assert html.paragraph("") == html.definitions({}) == ""
    assert Markup(html.definitions({"score": "how far"})).text == "score how far"
