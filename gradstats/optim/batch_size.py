"""Batch sizes that change within a run: any function of the examples seen, or grown with the measured noise scale.

The learning rate and all else stay as tuned: optimizers that count examples take every batch as it comes.

    stats = gradstats.attach(model, "second_moment", "noise_scale")
    size = AdaptiveBatchSize(minimum=32, maximum=1024, horizon=100_000)
    loader = DataLoader(data, batch_sampler=ScheduledBatchSampler(RandomSampler(data), size))
    for x, y in loader:
        F.cross_entropy(model(x), y).backward()
        size.update(stats)
        optimizer.step()
        optimizer.zero_grad()
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch.utils.data import Sampler

from gradstats.errors import GradstatsError
from gradstats.handle import Handle
from gradstats.noise_scale import NoiseScale

BatchSizeSchedule = Callable[[int], int]  # from the examples seen before a batch to its size

ENOUGH_BATCHES = 10  # for their scatter to tell how well an average is known


class ScheduledBatchSampler(Sampler[list[Any]]):
    """Batches of indices for DataLoader(batch_sampler=...), whose size is a function of the examples drawn before.

    Arguments:
        sampler: gives the indices of one epoch: a RandomSampler, or any iterable that ends.
        batch_size: a number, or a function of the examples drawn so far, over all epochs.
        drop_last: leaves the last batch of an epoch away if it would be smaller than its size.

    A checkpoint holds what is left of the epoch, and the first epoch after it is that: no example is lost or repeated,
    whatever the sampler. (The order of later epochs is the sampler's, whose random state is saved by whoever owns it.)

    A DataLoader with workers draws num_workers * prefetch_factor batches ahead of training, and Accelerate one. They
    have the size that was right when they were drawn, so that an adaptive batch size follows that many batches late;
    the optimizer counts what it gets. Checkpoints must not count them as trained on: state_dict(optimizer.examples),
    with the examples of steps that a GradScaler skipped added, since the optimizer does not count these.
    """

    def __init__(self, sampler: Iterable[Any], batch_size: int | BatchSizeSchedule, drop_last: bool = False):
        self.sampler = sampler
        self.drop_last = drop_last
        self.examples = 0  # drawn so far, over all epochs
        self._size = batch_size
        self._order: list[Any] = []  # of the epoch under way, or to be resumed
        self._start = 0  # examples drawn before its first
        self._resumes = False
        self.size(0)

    def size(self, examples: int) -> int:
        """Of the batch after so many examples. Raises: GradstatsError for one that is not a positive integer."""
        size = self._size(examples) if callable(self._size) else self._size
        if not isinstance(size, int) or size < 1:
            raise GradstatsError(f"the batch size after {examples} examples must be a positive integer, not {size!r}")
        return size

    def __iter__(self) -> Iterator[list[Any]]:
        if not self._continues:
            self._order, self._start = list(self.sampler), self.examples
        self._resumes = False
        begin = 0
        for size in self._sizes(len(self._order)):
            batch = self._order[begin : begin + size]
            begin += size
            self.examples += size
            yield batch

    def __len__(self) -> int:
        """Batches of an epoch that begins now, by the sizes as they are foreseen now."""
        left = len(self._order) if self._continues else len(self.sampler)  # type: ignore[arg-type]
        return len(list(self._sizes(left)))

    @property
    def _continues(self) -> bool:
        """Whether the next epoch is the rest of one, rather than new."""
        return self._resumes and any(self._sizes(len(self._order)))

    def _sizes(self, left: int) -> Iterator[int]:
        """Of the batches from here on, each decided when it is asked for."""
        examples = self.examples
        while left > 0:
            size = self.size(examples)
            if size > left and self.drop_last:
                return
            size = min(size, left)
            yield size
            examples += size
            left -= size

    def state_dict(self, examples: int | None = None) -> dict[str, Any]:
        """Where a run stands that has trained on so many examples: all that were drawn, or fewer where a loader reads
        ahead. Raises: GradstatsError for a number outside the epoch under way."""
        examples = self.examples if examples is None else examples
        if not self._start <= examples <= self.examples:
            raise GradstatsError(
                f"the epoch under way began after {self._start} examples, and {self.examples} were drawn: the sampler "
                f"cannot continue from {examples}"
            )
        return {"examples": examples, "left": self._order[examples - self._start :]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.examples = self._start = state["examples"]
        self._order = list(state["left"])
        self._resumes = True


class AdaptiveBatchSize:
    """A batch size that follows the gradient noise scale: `minimum` times a power of two, at most `maximum`.

    |G|^2 and tr Sigma are averaged over `horizon` examples. With (low, high) the interval of B_simple at 95%
    (NoiseScale), a batch size B

        doubles     if fraction low >= 2 B
        is halved   if fraction high < B / 2, unless grow_only

    by `update`, which is called after every backward pass: once at most, and not before 10 B examples were seen. So
    what cannot be told from noise changes nothing, and B tends to between 1/4 and 1 of fraction B_simple.

    Arguments:
        minimum: the first size; at least 2, since one example has no variance.
        maximum: what memory and the learning rate allow: the step on a batch is proportional to B.
        horizon: memory of the averages in examples, at least 10 maximum. The noise scale should change little within.
        fraction: of B_simple, at which a run takes about twice the fewest steps and twice the fewest examples that it
            could; smaller fractions save examples, larger ones steps.
        grow_only: noise scales grow over a run, mostly.

    `noise` is the NoiseScale. `update` waits for the device. Under DistributedDataParallel and FSDP2 sizes are those of
    all ranks together, which decide alike: docs/distributed.md has the loop.

    Source: McCandlish et al., arXiv:1812.06162, appendix D, on batch sizes that follow the noise scale.
    """

    def __init__(self, minimum: int, maximum: int, horizon: float, fraction: float = 1.0, grow_only: bool = True):
        if not 2 <= minimum <= maximum:
            raise GradstatsError(f"the sizes must be 2 <= minimum <= maximum, not {minimum} and {maximum}")
        if horizon < ENOUGH_BATCHES * maximum:
            raise GradstatsError(
                f"horizon={horizon} is less than {ENOUGH_BATCHES} batches of maximum={maximum}: too few to tell how "
                f"well the noise scale is known"
            )
        if not fraction > 0:
            raise GradstatsError(f"fraction must be above zero, not {fraction}")
        self.minimum, self.maximum = minimum, maximum
        self.fraction, self.grow_only = fraction, grow_only
        self.size = minimum
        self.noise = NoiseScale(horizon)

    def __call__(self, examples: int) -> int:
        return self.size

    def update(self, stats: Handle) -> None:
        """Takes a batch into account. Raises: MissingStatistic if "noise_scale" was not collected."""
        before = self.noise.examples
        self.noise.update(stats)
        if self.noise.examples == before or self.noise.examples < ENOUGH_BATCHES * self.size:
            return
        low, high = (self.fraction * bound for bound in self.noise.interval())
        if 2 * self.size <= min(low, self.maximum):
            self.size *= 2
        elif high < self.size / 2 and self.size > self.minimum and not self.grow_only:
            self.size //= 2

    def state_dict(self) -> dict[str, Any]:
        return {"size": self.size, "noise": self.noise.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.size = state["size"]
        self.noise.load_state_dict(state["noise"])
