"""The order of the examples: one for all batch sizes, and resumable from a single number; and what is drawn of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from experiments.distributed import ALONE, Process
from experiments.errors import UserError


class Sampler:
    """One permutation of the training set an epoch, all of them concatenated and cut into batches.

    Batches run across the ends of epochs, so the stream of examples is the same for every batch size. The permutation
    of an epoch is a function of the seed and the epoch: position, the examples drawn so far, is the whole state.

    Of every batch a process takes its own rows. B and position count those of all processes, so that another number of
    them continues where these are.
    """

    def __init__(
        self, examples: int, batch_size: int, seed: int, device: torch.device, process: Process = ALONE
    ) -> None:
        if not 1 <= batch_size <= examples:
            raise UserError(f"train.batch_size={batch_size} must be between 1 and the {examples} training examples")
        self.examples = examples
        self.batch_size = batch_size
        self.seed = seed
        self.device = device
        self.rows = process.rows(batch_size)
        self.position = 0

    def until(self, stop: int) -> Iterator[Tensor]:
        """Indices of the rows (B_r,) of batches from the position to stop examples, a multiple of the batch size."""
        if self.position == stop:
            return
        stream = torch.from_numpy(self.stream(self.position, stop)).to(self.device)
        for indices in self.own(stream):
            self.position += self.batch_size
            yield indices

    def own(self, stream: Tensor) -> Sequence[Tensor]:
        """This process' rows of each batch, where stream (batches * B, ...) has a row for each example."""
        # Views of one tensor: at batch size 1 a new tensor a step would show.
        return stream.unflatten(0, (-1, self.batch_size))[:, self.rows].unbind()

    def stream(self, start: int, stop: int) -> NDArray[np.int64]:
        """Indices of the examples from start to stop in the stream, (stop - start,)."""
        return by_epoch(lambda epoch: permutation(self.seed, epoch, self.examples), self.examples, start, stop)

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def by_epoch(draw: Callable[[int], NDArray[np.int64]], examples: int, start: int, stop: int) -> NDArray[np.int64]:
    """What is drawn for the examples from start to stop of the stream, where draw(epoch) is for all of an epoch's."""
    epochs = range(start // examples, (stop - 1) // examples + 1)
    return np.concatenate([draw(n)[max(0, start - n * examples) : stop - n * examples] for n in epochs])


# One is asked for many times an epoch, and takes a second where there are ten million examples; a batch may need two.
@lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, examples: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(examples)


class Draws:
    """What draws the examples that statistics are gathered over (engine.fraction), resumable."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"].cpu())
