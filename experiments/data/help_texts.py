"""A text that comes with Python: that of its help, which differs between its versions."""

from __future__ import annotations

from functools import cache
from pydoc_data.topics import topics


@cache
def help_texts() -> bytes:
    """One after the other, in the order of their names; UTF-8."""
    return "".join(topics[name] for name in sorted(topics)).encode()
