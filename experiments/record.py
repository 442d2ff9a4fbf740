"""The result of one run: what studies and reports read, and nothing else."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from experiments.atomic import atomic_write
from experiments.errors import UserError

FILE = "record.json"


@dataclass
class Record:
    """Losses are in nats per target, over the full training and test sets, or over data.evaluated sequences of each, in
    evaluation mode.

    lr is the one at the batch size of tuning, before any scaling rule; seconds is the time spent in training,
    evaluation included, and processor_seconds that of all threads of this process, in which what else the machine does
    hardly shows (None of a run that began before it was counted); rounding: what rounds matmuls of statistics to
    bfloat16 (None: nothing does); fingerprint identifies everything in the configuration that decides the numbers.
    """

    method: str
    label: str
    lr: float
    batch_size: int
    seed: int
    fingerprint: str
    status: Literal["running", "finished", "diverged"] = "running"
    examples: list[int] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    test_loss: list[float] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)
    seconds: float = 0.0
    processor_seconds: float | None = None
    rounding: Literal["hardware", "emulated"] | None = None

    @property
    def final_train_loss(self) -> float:
        """That of the initial model, of a run that diverged: what it had learnt is lost."""
        return self.train_loss[self._last]

    @property
    def final_test_loss(self) -> float:
        """The same of the test loss."""
        return self.test_loss[self._last]

    @property
    def _last(self) -> int:
        return 0 if self.status == "diverged" else -1

    def save(self, path: Path) -> None:
        with atomic_write(path) as file:
            file.write(json.dumps(dataclasses.asdict(self), indent=1).encode())

    @classmethod
    def load(cls, path: Path) -> Record:
        """Raises UserError if the file is missing, or is not a record."""
        try:
            return cls(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{path} is not a record of a run ({error}): delete it to run again") from error
