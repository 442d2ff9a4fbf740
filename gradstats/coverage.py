"""Which parameters have statistics: those that `attach` was told to ignore, and the table of the others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from gradstats.errors import GradstatsError


def ignored(model: nn.Module, ignore: Sequence[str]) -> dict[str, nn.Parameter]:
    """Parameters named, or within modules named, in `ignore`, by the first of their names. Raises: GradstatsError for
    an entry that names none."""
    if isinstance(ignore, str):
        raise GradstatsError(f"ignore is a list of names: ignore=[{ignore!r}]")
    found: set[int] = set()
    named = dict(model.named_parameters(remove_duplicate=False))
    for entry in ignore:
        own = [id(p) for name, p in named.items() if name == entry or name.startswith(entry + ".")]
        if not own:
            raise GradstatsError(f"ignore: no parameter or module is called '{entry}'")
        found.update(own)
    return {name: p for name, p in model.named_parameters() if id(p) in found}


def table(rows: Iterable[tuple[str, nn.Parameter, int | None, str, str]]) -> str:
    """The coverage table from (parameter name, parameter, uses in a forward, what serves it, why)."""
    cells = [("parameter", "shape", "uses", "served by", "why")]
    for name, p, uses, served, why in rows:
        count = "" if uses is None else str(uses)
        cells.append((name, str(tuple(p.shape)), count, served if p.requires_grad else "frozen", why))
    widths = [max(len(row[i]) for row in cells) for i in range(5)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in cells)
