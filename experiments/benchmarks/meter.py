"""Peak memory of steps, above what was there before its contestant was made."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch.profiler import ProfilerActivity, profile, record_function

MARK = "the measured steps"


class Meter(Protocol):
    """`contestant` is around everything that a contestant does, `steps` around those that are measured."""

    peak: int  # bytes

    def contestant(self) -> Any: ...

    def steps(self) -> Any: ...


class Profiled:
    """Every allocation and release that torch's allocator on the CPU makes, those inside of operations included, as the
    profiler records them. Not what libraries keep for themselves (packed weights of oneDNN)."""

    def __init__(self) -> None:
        self.peak = 0

    @contextmanager
    def contestant(self) -> Iterator[None]:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
            yield
        results: Any = profiler.profiler
        events = results.kineto_results.events()
        (mark,) = (e for e in events if e.name() == MARK)
        begin, end = mark.start_ns(), mark.start_ns() + mark.duration_ns()
        held = 0
        for at, size in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
            if at > end:
                break
            if at >= begin:
                self.peak = max(self.peak, held)
            held += size
            if at >= begin:
                self.peak = max(self.peak, held)

    def steps(self) -> record_function:
        return record_function(MARK)


class Cuda:
    """Of torch's caching allocator, which counts itself."""

    def __init__(self) -> None:
        self.peak = 0
        self.before = torch.cuda.memory_allocated()

    @contextmanager
    def contestant(self) -> Iterator[None]:
        yield
        self.peak = torch.cuda.max_memory_allocated() - self.before

    @contextmanager
    def steps(self) -> Iterator[None]:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        yield
        torch.cuda.synchronize()


def resident() -> int:
    """Bytes that this process has had in memory at most; coarse, since the system's allocators keep what was freed."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
