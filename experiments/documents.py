"""Tables as a terminal and a document show them, and the parts of documents that commands write.

Imports nothing but the standard library until a terminal asks: machines that only measure have little installed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from experiments.atomic import atomic_write
from experiments.errors import UserError

if TYPE_CHECKING:
    import rich.table


class Number(Protocol):
    """str() is for documents, `text` for a terminal, where intervals would not fit."""

    def text(self) -> str: ...

    def interval(self) -> str: ...


Cell = str | Number


@dataclass(frozen=True)
class Table:
    """The first column holds what is compared; emphasised rows are bold."""

    title: str
    explanation: str
    columns: list[str]
    rows: list[list[Cell]]
    emphasised: tuple[int, ...]

    def rich(self) -> rich.table.Table:
        """Without intervals, which would not fit into 80 columns."""
        import rich.box
        import rich.table

        table = rich.table.Table(title=self.title, title_justify="left", box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        cells = [[cell if isinstance(cell, str) else cell.text() for cell in row] for row in self.rows]
        for i, column in enumerate(self.columns):
            table.add_column("\n".join(column.split()), justify="right" if i else "left", no_wrap=True)
        for i, row in enumerate(cells):
            table.add_row(*row, style="bold" if i in self.emphasised else "")
        return table


def markdown(table: Table) -> str:
    """A heading, the table in GitHub's form, and what its columns mean."""
    lines = [f"**{table.title}.** {table.explanation}", ""]
    lines += ["| " + " | ".join(table.columns) + " |", "|" + "---|" * len(table.columns)]
    for i, row in enumerate(table.rows):
        cells = [str(cell) for cell in row]
        cells[0] = f"**{cells[0]}**" if i in table.emphasised else cells[0]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def fill(text: str, name: str, written: str, document: Path) -> str:
    """Replaces what stands between the document's markers called `name`. Raises: UserError if there are none."""
    markers = re.compile(rf"(<!-- {name}: .*? -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    if not markers.search(text):
        raise UserError(f"{document} has no lines '<!-- {name}: ... -->' and '<!-- /{name} -->' to write between")
    return markers.sub(lambda m: f"{m[1]}{written}\n{m[2]}", text)


def fill_document(document: Path, name: str, written: str) -> None:
    """`fill` in a file, by itself."""
    text = fill(document.read_text(encoding="utf-8"), name, written, document)
    with atomic_write(document) as file:
        file.write(text.encode())
