from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiments.data import Dataset, Split, batches, load_data, loading
from experiments.data.augmentation import Augmentation
from experiments.data.dataset import placed
from experiments.data.loading import AHEAD, prefetched
from experiments.distributed import Process
from experiments.sampler import Sampler
from experiments.schemas.data import TokensConfig

CPU = torch.device("cpu")
N = 40
X, Y = torch.randn(N, 1, 4, 4), torch.arange(N)


def data(augmentation: Augmentation | None = None) -> Dataset:
    split = Split(X, Y)
    return Dataset(split, split, N, augmentation=augmentation)


def whole(data: Dataset, batch_size: int, stops: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """All batches together, on the way to the last stop."""
    sampler = Sampler(N, batch_size, 0, CPU)
    found = []
    for stop in stops:
        for x, y in batches(data, sampler, stop):
            found.append((x, y))
            assert len(y) == batch_size and sampler.position == len(found) * batch_size
    x, y = (torch.cat(parts) for parts in zip(*found, strict=True))
    return x, y


@pytest.mark.parametrize("augmentation", [None, Augmentation(2, flip=True)])
def test_the_stream_is_the_same_for_every_batch_size_and_stop(augmentation: Augmentation | None) -> None:
    x, y = whole(data(augmentation), 1, [120])
    assert torch.equal(y, torch.from_numpy(Sampler(N, 1, 0, CPU).stream(0, 120)))
    assert torch.equal(x, X[y]) == (augmentation is None)
    for batch_size, stops in {4: [20, 120], 24: [24, 24, 120], 40: [120]}.items():
        again = whole(data(augmentation), batch_size, stops)
        assert torch.equal(x, again[0]) and torch.equal(y, again[1])


@pytest.mark.parametrize("mapped", [False, True], ids=["in memory", "read ahead"])
@pytest.mark.parametrize("augmentation", [None, Augmentation(2, flip=True)])
def test_processes_have_the_rows_of_a_batch_between_them(augmentation: Augmentation | None, mapped: bool) -> None:
    split = Split(X, Y, mapped=mapped)
    dataset = Dataset(split, split, N, augmentation=augmentation)
    parts = [list(batches(dataset, Sampler(N, 8, 0, CPU, Process(rank, 3)), 120)) for rank in range(3)]
    x, y = (torch.cat([part[i] for batch in zip(*parts, strict=True) for part in batch]) for i in (0, 1))
    expected = whole(dataset, 8, [120])
    assert torch.equal(x, expected[0]) and torch.equal(y, expected[1])


ORDER = torch.from_numpy(Sampler(N, 1, 0, CPU).stream(0, 120))


@pytest.mark.parametrize("batch_size", [1, 8, 40])
def test_batches_that_are_read_ahead_are_those_asked_for(batch_size: int) -> None:
    found = list(prefetched(Split(X, Y), ORDER.split(batch_size), CPU))
    assert len(found) == 120 // batch_size
    assert torch.equal(torch.cat([y for _, y in found]), ORDER)
    assert torch.equal(torch.cat([x for x, _ in found]), X[ORDER])


@pytest.mark.parametrize(
    ("split", "ahead"),
    [(Split(X, Y), False), (Split(X, Y, mapped=True), True), (Split(X.to("meta"), Y.to("meta")), True)],
)
def test_what_is_not_on_the_device_is_read_ahead(split: Split, ahead: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Split] = []

    def watched(own: Split, *arguments: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        asked.append(own)
        return prefetched(Split(X, Y), *arguments)

    monkeypatch.setattr(loading, "prefetched", watched)
    sampler = Sampler(N, 8, 0, CPU)
    found = [(sampler.position, y) for _, y in batches(Dataset(split, Split(X, Y), N), sampler, 120)]
    assert [position for position, _ in found] == list(range(8, 121, 8)) and len(asked) == ahead
    assert torch.equal(torch.cat([y for _, y in found]), ORDER)


def test_no_more_is_read_than_is_soon_needed_and_failures_are_raised() -> None:
    class Watched(Split):
        def take(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            read.append(len(indices))
            if len(read) == 12:
                raise OSError("the disk is gone")
            return super().take(indices)

    read: list[int] = []
    stream = prefetched(Watched(X, Y), ORDER.split(4), CPU)
    next(stream)
    next(stream)
    assert len(read) <= AHEAD + 2
    with pytest.raises(OSError, match="the disk is gone"):
        list(stream)
    assert len(read) <= 12 + AHEAD


def test_what_is_read_ahead_and_left_ends_the_thread() -> None:
    before = threading.active_count()
    stream = prefetched(Split(X, Y), ORDER.split(4), CPU)
    next(stream)
    assert threading.active_count() == before + 1
    stream.close()
    assert threading.active_count() == before


def test_a_set_that_fills_the_device_stays_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    size = X.nbytes + Y.nbytes
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * size - 1, 10 * size))
    split = Split(X, Y)
    assert placed(split, torch.device("cuda")) is split
    assert torch.equal(placed(split, CPU).x, X)
    moved: list[torch.device] = []
    monkeypatch.setattr(Split, "to", lambda self, device: moved.append(device) or self)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * size, 10 * size))
    placed(split, torch.device("cuda"))
    assert moved == [torch.device("cuda")]


def test_tokens_are_read_from_the_file_where_they_are_needed(tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, 300, 2001).astype(np.uint16)
    tokens.tofile(tmp_path / "tokens.bin")
    loaded = load_data(TokensConfig("tokens", str(tmp_path / "tokens.bin"), 300, 50, 16, 0.1), CPU)
    sampler = Sampler(len(loaded.train), 4, 0, CPU)
    for x, y in batches(loaded, sampler, 8):
        indices = sampler.stream(sampler.position - 4, sampler.position)
        assert x.dtype == y.dtype == torch.int64
        assert x.tolist() == [tokens[50 * i : 50 * i + 50].tolist() for i in indices]
        assert y.tolist() == [tokens[50 * i + 1 : 50 * i + 51].tolist() for i in indices]
