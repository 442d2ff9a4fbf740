"""How far training is: a bar for one run, and one line for many runs in many processes.

The processes of many runs share a small file with one row a run, which each run overwrites and the parent reads a few
times a second: nothing waits for anything. Where the line goes into a file, it is written anew every minute.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

# Called with examples seen, examples in all, and a loss.
Notify = Callable[[int, int, float], None]

# Columns of a row: examples seen, examples in all, training loss, time of writing.
COLUMNS = 4
SECONDS_BETWEEN_READS = 0.25
SECONDS_BETWEEN_LINES = 60.0  # in a file


def silent(examples_seen: int, total: int, loss: float) -> None:
    """Shows nothing."""


@contextmanager
def progress_bar(name: str, shown: bool) -> Iterator[Notify]:
    """A bar on stderr, if that is a terminal; what is yielded moves it."""
    columns = (
        TextColumn(name),
        BarColumn(),
        TextColumn("{task.completed:,.0f} of {task.total:,.0f} examples, loss {task.fields[loss]:.4f},"),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not (shown and console.is_terminal)) as bar:
        task = bar.add_task(name, visible=False)
        yield lambda seen, total, loss: bar.update(task, completed=seen, total=total, loss=loss, visible=True)


def note(board: Path, run: int, examples: int, total: int, loss: float) -> None:
    """From any process: how far a run is."""
    row = np.memmap(board, np.float64, "r+", offset=8 * COLUMNS * run, shape=COLUMNS)
    row[:] = examples, total, loss, time.time()


class Rest(TextColumn):
    """Takes what the other columns leave of the line, and cuts its text there."""

    def __init__(self, text_format: str) -> None:
        # Of the columns of a grid, those that may wrap shrink first; the text then does not wrap.
        super().__init__(text_format, table_column=Column(no_wrap=False))

    def render(self, task: Task) -> Text:
        text = super().render(task)
        text.no_wrap, text.overflow = True, "ellipsis"
        return text


@contextmanager
def progress_line(names: Sequence[str], costs: Sequence[float], before: int, console: Console) -> Iterator[Path]:
    """Show the progress of runs with these names and relative costs, after a number of runs that were done before.

    Yields the file for ``note``. Time left is the time since the start in proportion to the cost of what is left: the
    runs at small batch sizes take most of the time, and come first.
    """
    columns = (
        BarColumn(bar_width=24),
        TextColumn("{task.fields[runs]}"),
        TextColumn("{task.fields[left]}"),
        Rest("{task.fields[latest]}"),
    )
    with TemporaryDirectory() as folder, Progress(*columns, console=console) as progress:
        path = Path(folder) / "board"
        board = np.memmap(path, np.float64, "w+", shape=(len(costs), COLUMNS))
        task = progress.add_task("", total=sum(costs), runs="", latest="", left="")
        start, stopped = time.time(), threading.Event()

        def watch() -> None:
            written = start
            while not stopped.wait(SECONDS_BETWEEN_READS):
                show(np.array(board), names, np.array(costs), before, time.time() - start, progress, task)
                if not console.is_terminal and time.time() - written > SECONDS_BETWEEN_LINES:
                    written = time.time()
                    console.print("{runs} {left} {latest}".format(**progress.tasks[0].fields), soft_wrap=True)
            show(np.array(board), names, np.array(costs), before, time.time() - start, progress, task)

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            yield path
        finally:
            stopped.set()
            watcher.join()


def show(
    board: NDArray[np.float64],
    names: Sequence[str],
    costs: NDArray[np.float64],
    before: int,
    elapsed: float,
    progress: Progress,
    task: TaskID,
) -> None:
    examples, total, loss, written = board.T
    share = np.divide(examples, total, out=np.zeros_like(total), where=total > 0)
    done, latest = float(costs @ share), int(written.argmax())
    left = elapsed * (costs.sum() - done) / done if done else 0.0
    # A measurement has no loss, and a run that diverged none that says anything.
    lost = "" if np.isnan(loss[latest]) else f"loss {loss[latest]:.3f} "
    progress.update(
        task,
        completed=done,
        runs=f"{before + int((share == 1).sum())}/{before + len(costs)} runs",
        latest=f"{lost}{names[latest]}" if done else "",
        left=f"{int(left // 60)}:{int(left % 60):02} left" if done else "",
    )
