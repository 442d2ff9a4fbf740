"""What a user can put right: printed as one message with exit code 2, never as a traceback."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from gradstats.errors import GradstatsError

Choice = TypeVar("Choice")

SHOWN_INDICES = 8

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UserError(Exception):
    """The text names the thing that is wrong and the way out."""


class Diverged(UserError):
    """The loss or a parameter stopped being finite.

    step: the first such step, counted from 1; indices: the rows of the training set in its batch;
    checkpoint: the last one written, all finite, or None.
    """

    def __init__(self, step: int, indices: Sequence[int], checkpoint: Path | None) -> None:
        self.step = step
        self.indices = tuple(indices)
        self.checkpoint = checkpoint
        shown = ", ".join(str(index) for index in self.indices[:SHOWN_INDICES])
        more = f", ... ({len(self.indices)} in all)" if len(self.indices) > SHOWN_INDICES else ""
        kept = f"the last good checkpoint is kept: {checkpoint}" if checkpoint else "no checkpoint had been written yet"
        super().__init__(
            f"the loss is not finite at step {step}, on training examples [{shown}{more}]; {kept}. "
            "Lower optimizer.lr, lengthen train.warmup_examples, or set train.max_norm."
        )

    def __reduce__(self) -> tuple[type[Diverged], tuple[int, tuple[int, ...], Path | None]]:
        # An exception is rebuilt from its message by default, and this one crosses process borders in a study.
        return Diverged, (self.step, self.indices, self.checkpoint)


@contextmanager
def as_user_errors() -> Iterator[None]:
    """Refusals of gradstats and of OmegaConf are the user's to put right too; their text already says how. So is a full
    disk."""
    from omegaconf.errors import OmegaConfBaseException  # here: benchmarks run where it is not installed

    try:
        yield
    except GradstatsError as error:
        raise UserError(f"gradstats: {error}") from error
    except OmegaConfBaseException as error:
        raise UserError(f"configuration: {error}") from error
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise UserError(
            f"{error}: make room there. What was written before is whole, and resume=true continues from it"
        ) from error


@contextmanager
def command_line(interrupted: str = "interrupted") -> Iterator[None]:
    """Around the body of a main: one message on stderr, and exit code 2; 130 after Ctrl-C, as of a shell."""
    try:
        with as_user_errors():
            yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        raise SystemExit(130) from None


def check_distinct(key: str, values: Sequence[object]) -> None:
    """Raises UserError for a setting that lists nothing, or anything twice."""
    if not values or len(set(values)) < len(values):
        raise UserError(f"{key}: {list(values)} must have one value or more, each of them once")


def choose(table: Mapping[str, Choice], name: str, key: str) -> Choice:
    """The entry of a table that the configuration names; UserError if there is none."""
    if name not in table:
        raise UserError(f"{key}={name} is unknown: choose one of {', '.join(table)}")
    return table[name]
