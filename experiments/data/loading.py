"""From the order of the examples to batches on the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from experiments.data.dataset import Dataset, Split
from experiments.sampler import Sampler

AHEAD = 4  # batches that are read while others are trained on

Batch = tuple[Tensor, Tensor]


def batches(data: Dataset, sampler: Sampler, stop: int) -> Iterator[Batch]:
    """x and y of the sampler's rows on its device, up to `stop` examples; sampler.position counts a batch when its rows
    are handed out."""
    start, device = sampler.position, sampler.device
    if start == stop:
        return
    taken: Iterator[Batch]
    if data.train.x.device.type == device.type and not data.train.mapped:
        taken = map(data.train.take, sampler.until(stop))
    else:
        ahead = prefetched(data.train, sampler.own(torch.from_numpy(sampler.stream(start, stop))), device)
        taken = (batch for _, batch in zip(sampler.until(stop), ahead, strict=True))
    if data.augmentation is None:
        yield from taken
        return
    drawn = data.augmentation.draws(sampler.seed, sampler.examples, start, stop)
    for (x, y), draws in zip(taken, sampler.own(torch.from_numpy(drawn).to(device)), strict=True):
        yield data.augmentation.apply(x, draws), y


def prefetched(split: Split, order: Iterable[Tensor], device: torch.device) -> Iterator[Batch]:
    """Batches of a split that stays on the host or in a file, read by a thread ahead of their use."""

    def read(indices: Tensor) -> Batch:
        x, y = split.take(indices)
        # The device copies from pinned memory by itself, while the host goes on.
        return (x.pin_memory(), y.pin_memory()) if device.type == "cuda" else (x, y)

    with ThreadPoolExecutor(1) as reader:
        pending: deque[Future[Batch]] = deque()
        for indices in order:
            pending.append(reader.submit(read, indices))
            if len(pending) > AHEAD:
                yield transferred(pending.popleft().result(), device)
        while pending:
            yield transferred(pending.popleft().result(), device)


def transferred(batch: Batch, device: torch.device) -> Batch:
    x, y = (part.to(device, non_blocking=True) for part in batch)
    return x, y
