"""experiments.train, and a line for every step: which examples it was given. For experiments.faults, under torchrun.

python -m experiments.witness FOLDER experiment=digits directory=outputs/mine resume=true
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from torch import Tensor

from experiments import train
from experiments.distributed import this_process
from experiments.errors import UserError
from experiments.sampler import Sampler


@dataclass
class Attempt:
    """What a process was given before it ended: the training examples of each step, by the examples seen after it."""

    pid: int
    steps: dict[int, list[int]] = field(default_factory=dict)


def path(folder: Path, attempt: int, rank: int) -> Path:
    return folder / f"{attempt}-{rank}.txt"


def witnessed(folder: Path, attempt: int, rank: int) -> Attempt:
    """As it was written down; a line that a kill cut off is left out. Without steps if it has not begun to train."""
    file = path(folder, attempt, rank)
    whole = file.read_text().rpartition("\n")[0] if file.exists() else ""
    if not whole:
        return Attempt(0)
    pid, *steps = ([int(word) for word in line.split()] for line in whole.splitlines())
    return Attempt(pid[0], {position: indices for position, *indices in steps})


class Witness(Sampler):
    def __init__(self, file: TextIO, *args: Any) -> None:
        super().__init__(*args)
        self._file = file

    def until(self, stop: int) -> Iterator[Tensor]:
        for indices in super().until(stop):
            print(self.position, *indices.tolist(), file=self._file)
            yield indices


def main() -> None:
    if len(sys.argv) < 2 or "=" in sys.argv[1]:
        raise UserError("the first argument is the folder to write to")
    folder, process = Path(sys.argv.pop(1)), this_process()
    folder.mkdir(parents=True, exist_ok=True)
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    # A line at a time: what is written outlives a kill of the process.
    with path(folder, attempt, process.rank).open("w", buffering=1) as file:
        print(os.getpid(), file=file)
        train.Sampler = lambda *args: Witness(file, *args)  # type: ignore[assignment,misc]
        train.start()


if __name__ == "__main__":
    main()
