"""Bytes that are alive, of tensors with and without memory."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from experiments.planning.live import Live

KIB = 1024


def test_what_is_dropped_no_longer_counts() -> None:
    before = torch.zeros(64 * KIB // 4)
    with Live(known=[before]) as live:
        kept = before + 1  # 64
        twice = kept * 2  # 128 at the peak
        del twice
        view = kept.view(2, -1)[0]
        before.add_(1)
        assert live.now == 64 * KIB
        del kept
        assert live.now == 64 * KIB  # the view still has it
        del view
        assert (live.now, live.peak) == (0, 128 * KIB)


def test_without_memory() -> None:
    with FakeTensorMode(), Live() as live:
        huge = torch.zeros(1 << 40)
        assert live.now == huge.nbytes == 1 << 42
