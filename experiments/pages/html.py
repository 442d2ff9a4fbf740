"""Tables, findings and the frame of a page as HTML."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template

from experiments.documents import Cell, Table
from experiments.estimate import Finding, Verdict, count

CHART = '<figure class="chart"'  # as a chart begins
HERE = Path(__file__).parent
MISSES_FIRST: tuple[Verdict | None, ...] = ("does not hold", "cannot be judged", "holds", None)
LONG = 25  # rows: a table with more scrolls inside a part of the screen


def page(*, title: str, introduction: str, body: str, footer: str) -> str:
    """One document without external resources. introduction and body are HTML, the others text.

    Only charts need a script.
    """
    script = f"<script>\n{_read('page.js')}\n</script>" if CHART in body else ""
    return Template(_read("page.html")).substitute(
        title=escape(title),
        style=_read("page.css"),
        script=script,
        introduction=introduction,
        body=body,
        footer=escape(footer),
    )


def section(heading: str, content: str) -> str:
    name = "-".join(heading.lower().split())
    return f'<section aria-labelledby="{name}">\n<h2 id="{name}">{escape(heading)}</h2>\n{content}\n</section>'


def paragraph(text: str, kind: str = "") -> str:
    attribute = f' class="{kind}"' if kind else ""
    return f"<p{attribute}>{escape(text)}</p>" if text else ""


def scrolling(name: str, content: str, kind: str = "") -> str:
    """What is wider than a telephone scrolls inside itself, by keyboard too."""
    return f'<div class="scroll {kind}" tabindex="0" role="region" aria-label="{escape(name)}">\n{content}\n</div>'


def commands(name: str, lines: Sequence[str]) -> str:
    return scrolling(name, f"<pre><code>{escape(chr(10).join(lines))}</code></pre>")


def definitions(terms: Mapping[str, str]) -> str:
    if not terms:
        return ""
    listed = (f"<dt>{escape(term)}</dt>\n<dd>{escape(meaning)}</dd>" for term, meaning in terms.items())
    return "<dl>\n" + "\n".join(listed) + "\n</dl>"


def findings(found: Sequence[Finding]) -> str:
    """How many claims hold, where there are several; then what does not hold, what is open, what holds, and notes."""
    claims = [finding for finding in found if finding.verdict]
    counted = paragraph(f"Of {len(claims)} claims {count(claims)}.") if len(claims) > 1 else ""
    listed = "\n".join(map(_finding, sorted(found, key=lambda finding: MISSES_FIRST.index(finding.verdict))))
    return f'{counted}\n<ul class="findings">\n{listed}\n</ul>'


def _finding(finding: Finding) -> str:
    if finding.verdict is None:
        return f"<li>{escape(finding.sentence)}</li>"
    name = finding.verdict.replace(" ", "-")
    verdict = f'<strong>{escape(finding.bar)}: <span class="{name}">{finding.verdict}</span></strong>'
    return f"<li>{verdict} {escape(finding.sentence)}</li>"


def table(table: Table, keys: Sequence[str] = ()) -> str:
    """keys: of the groups whose rows they are, in the charts of the page."""
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in table.columns)
    body = "\n".join(
        f"<tr{_attributes(i in table.emphasised, keys[i] if keys else '')}>{_row(row)}</tr>"
        for i, row in enumerate(table.rows)
    )
    content = f"<table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table>"
    # Outside of what scrolls, or a telephone would show the beginning of each of its lines.
    return (
        f"<h3>{escape(table.title)}</h3>\n{scrolling(table.title, content, 'long' if len(table.rows) > LONG else '')}\n"
        + paragraph(table.explanation, "muted")
    )


def properties(name: str, values: Mapping[str, str]) -> str:
    """A table of two columns."""
    rows = "\n".join(
        f'<tr><th scope="row">{escape(key)}</th><td>{escape(value)}</td></tr>' for key, value in values.items()
    )
    return scrolling(name, f"<table><tbody>\n{rows}\n</tbody></table>")


def columns(parts: Iterable[str]) -> str:
    """Beside each other where there is room."""
    return '<div class="parts">\n' + "\n".join(parts) + "\n</div>"


def details(summary: str, content: str) -> str:
    return f"<details>\n<summary>{escape(summary)}</summary>\n{content}\n</details>"


def unbroken(text: str) -> str:
    """An equation, as in "B = 16", stays on one line."""
    return escape(text).replace(" = ", "&nbsp;=&nbsp;")


def _attributes(emphasised: bool, key: str) -> str:
    return (' class="ours"' if emphasised else "") + (f' data-group="{key}"' if key else "")


def _row(row: Sequence[Cell]) -> str:
    return f'<th scope="row">{unbroken(str(row[0]))}</th>' + "".join(f"<td>{_cell(cell)}</td>" for cell in row[1:])


def _cell(cell: Cell) -> str:
    if isinstance(cell, str):
        return f'<span class="value">{escape(cell)}</span>'
    interval = f' <span class="interval">[{cell.interval()}]</span>' if "–" not in cell.interval() else ""
    return f'<span class="value">{cell.text()}</span>{interval}'


def _read(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")
