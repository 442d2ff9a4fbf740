"""Bytes as torch's allocator counts them."""

from __future__ import annotations

import torch

from experiments.benchmarks.meter import Profiled, resident

KIB = 1024


def floats(kib: int) -> torch.Tensor:
    return torch.empty(kib * KIB // 4)


def test_peak_of_the_marked_steps() -> None:
    before = floats(64)
    meter = Profiled()
    with meter.contestant():
        kept = floats(32)  # held between steps: counts
        large = floats(1024)  # gone before the step: does not
        del large
        with meter.steps():
            first = floats(16)
            del first
            second = floats(8)
        later = floats(512)
    assert meter.peak == 48 * KIB
    del before, kept, second, later


def test_what_operations_allocate_inside_is_seen() -> None:
    a = torch.randn(64, 64)
    meter = Profiled()
    with meter.contestant(), meter.steps():
        torch.logsumexp(a, dim=0).sum().item()
    assert meter.peak > 64 * 64 * 4  # logsumexp subtracts the maximum in a temporary, and returns 64 numbers


def test_resident_is_what_the_system_says() -> None:
    assert 10 * 2**20 < resident() < 2**40
