from __future__ import annotations

from itertools import chain

import pytest
import torch

from experiments.distributed import Process
from experiments.errors import UserError
from experiments.sampler import Sampler

CPU = torch.device("cpu")
N = 100


def drawn(batch_size: int, stops: list[int], seed: int = 0) -> list[list[int]]:
    sampler = Sampler(N, batch_size, seed, CPU)
    return [indices.tolist() for stop in stops for indices in sampler.until(stop)]


def joined(batches: list[list[int]]) -> list[int]:
    return list(chain.from_iterable(batches))


def test_the_stream_is_the_same_for_every_batch_size() -> None:
    streams = [joined(drawn(B, [256, 768])) for B in (1, 4, 64)]
    assert streams[0] == streams[1] == streams[2]


def test_every_epoch_is_another_permutation() -> None:
    stream = joined(drawn(4, [3 * N]))
    epochs = [stream[i * N : (i + 1) * N] for i in range(3)]
    assert all(sorted(epoch) == list(range(N)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert stream != joined(drawn(4, [3 * N], seed=1))


def test_batches_are_whole_across_the_ends_of_epochs_and_stops() -> None:
    assert {len(batch) for batch in drawn(64, [64, 320, 1280])} == {64}
    assert drawn(64, [64, 320, 1280]) == drawn(64, [1280])
    assert drawn(4, [0, 4, 4]) == drawn(4, [4])


def test_continues_from_its_state() -> None:
    first = Sampler(N, 8, 0, CPU)
    for _ in first.until(208):
        pass
    second = Sampler(N, 8, 0, CPU)
    second.load_state_dict(first.state_dict())
    assert [b.tolist() for b in second.until(400)] == [b.tolist() for b in first.until(400)]


def test_indices_of_a_step_can_be_had_again() -> None:
    assert Sampler(N, 16, 3, CPU).stream(96, 112).tolist() == drawn(16, [160], seed=3)[6]


@pytest.mark.parametrize("batch_size", [0, 101])
def test_refuses_a_batch_that_the_data_cannot_fill(batch_size: int) -> None:
    with pytest.raises(UserError, match=f"train.batch_size={batch_size} must be between 1 and the 100"):
        Sampler(N, batch_size, 0, CPU)


def test_processes_have_a_batch_between_them_and_any_number_of_them_continues() -> None:
    samplers = [Sampler(N, 16, 0, CPU, Process(rank, 3)) for rank in range(3)]
    parts = [[indices.tolist() for indices in sampler.until(160)] for sampler in samplers]
    assert [joined(list(batch)) for batch in zip(*parts, strict=True)] == drawn(16, [160])
    alone = Sampler(N, 16, 0, CPU)
    alone.load_state_dict(samplers[2].state_dict())
    assert [batch.tolist() for batch in alone.until(320)] == drawn(16, [320])[10:]
