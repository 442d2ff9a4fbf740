"""The largest batch in a memory of known size, and the memory of real steps."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from experiments import capacity
from experiments.capacity import free_memory, largest_batch, step_memory
from experiments.config import compose_config
from experiments.data import Dataset, load_data
from experiments.errors import UserError
from experiments.schemas.run import Config

CPU = torch.device("cpu")


def measured(peak: Callable[[int], float]) -> tuple[Callable[[int], float], list[int]]:
    """The peak, and the batch sizes at which it was asked for."""
    asked: list[int] = []

    def ask(batch_size: int) -> float:
        asked.append(batch_size)
        return peak(batch_size)

    return ask, asked


@pytest.mark.parametrize("budget", [120, 139.9, 140, 1000, 10_300])
def test_a_linear_peak_is_extrapolated_and_measured_there(budget: float) -> None:
    ask, asked = measured(lambda b: 100 + b)
    found = largest_batch(ask, first=10, most=1_000_000, budget=budget)
    assert found.batch_size == max(10 * 2**k for k in range(20) if 100 + 10 * 2**k <= budget)
    assert found.peaks[found.batch_size] == 100 + found.batch_size <= budget and not found.complete
    assert len(asked) == len(set(asked)) <= 4


def test_the_training_set_is_a_limit_too() -> None:
    ask, asked = measured(lambda b: 100 + b)
    found = largest_batch(ask, first=16, most=1437, budget=1e9)
    assert (found.batch_size, found.complete) == (1024, True) and asked == [16, 32, 1024]


@pytest.mark.parametrize(
    "peak",
    [lambda b: 100 + b**1.5, lambda b: 100 + b + 5000 * (b > 64), lambda b: 100 + b if b <= 40 else math.inf],
    ids=["convex", "jump", "out of memory"],
)
def test_where_the_line_is_wrong_the_measurement_decides(peak: Callable[[int], float]) -> None:
    ask, asked = measured(peak)
    found = largest_batch(ask, first=10, most=1 << 20, budget=2000)
    assert peak(found.batch_size) <= 2000 < peak(2 * found.batch_size)
    assert len(asked) == len(set(asked)) and max(asked) <= 1 << 20


def test_a_first_batch_that_does_not_fit_is_a_user_error() -> None:
    with pytest.raises(UserError, match=r"batch size 8 takes 3 GB, and 2 GB may be used: raise tune.memory_gb"):
        largest_batch(lambda b: 3e9, first=8, most=100, budget=2e9)
    with pytest.raises(UserError, match="batch size 8 does not fit, and 2 GB"):
        largest_batch(lambda b: math.inf, first=8, most=100, budget=2e9)


@pytest.fixture(scope="module")
def problem() -> tuple[Config, Dataset]:
    config = compose_config(["tracker=none", "model.widths=[256]"])
    return config, load_data(config.data, CPU)


def test_the_memory_of_a_step_is_what_it_allocates(problem: tuple[Config, Dataset]) -> None:
    config, data = problem
    peaks = {b: step_memory(config, data, CPU, b) for b in (256, 512, 1024)}
    # Parameters, gradients, squares and Adam's two averages, all of float32.
    parameters = 64 * 256 + 256 + 256 * 10 + 10
    assert peaks[256] > 5 * 4 * parameters
    # An example has its pixels and at least three tensors as wide as the hidden layer: before, after, and the gradient.
    an_example = (peaks[1024] - peaks[512]) / 512
    assert 4 * (64 + 3 * 256) <= an_example <= 3 * 4 * (64 + 3 * 256)
    assert (peaks[512] - peaks[256]) / 256 == pytest.approx(an_example, rel=0.2)


def test_a_gpu_that_is_full_is_no_error(problem: tuple[Config, Dataset], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(capacity, "training_step", full)
    assert step_memory(*problem, CPU, 16) == math.inf


def test_what_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1e8 < free_memory(CPU) < 1e14
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (7, 10))
    assert free_memory(torch.device("cuda")) == 7
