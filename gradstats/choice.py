"""Which of several ways to the same result is taken: the fastest one, found by running them all once.

    fastest(key, {"direct": lambda: ..., "pairs": lambda: ...})

Ways differ in rounding. A key keeps its way for the life of the process, so that what is computed twice in a process is
computed alike; other processes may choose otherwise, unless torch.use_deterministic_algorithms(True) asks that runs
repeat bit for bit: then the first way, which the caller chooses by a formula, is taken without measurement.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")

# Each way is run this often, all in turn, and judged by its best: the first run pays for caches and compilation.
ROUNDS = 3

_chosen: dict[Hashable, str] = {}
_unmeasured = False


def fastest(key: Hashable, ways: Mapping[str, Callable[[], T]]) -> T:
    """The result of one of the ways, by name: the fastest for this key.

    The key says all that the ways' times depend on (what is computed, device, dtype, sizes). Sizes that differ from
    batch to batch go into it by their order of magnitude, `size.bit_length()`, or every batch would be measured. Ways
    neither change their operands nor draw random numbers, since they run several times when the key is new.

    A way that runs out of memory is not chosen; if all do, the last one's error is raised.
    """
    if len(ways) == 1 or _unmeasured or torch.compiler.is_compiling() or torch.are_deterministic_algorithms_enabled():
        return next(iter(ways.values()))()
    name = _chosen.get(key, "")
    if name not in ways:
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            return next(iter(ways.values()))()  # nothing runs during a capture
        name = _chosen[key] = _measured(ways)
    return ways[name]()


@contextmanager
def unmeasured() -> Iterator[None]:
    """Inside, every first way is taken, as if runs had to repeat bit for bit."""
    global _unmeasured
    before, _unmeasured = _unmeasured, True
    try:
        yield
    finally:
        _unmeasured = before


def choices() -> dict[Hashable, str]:
    """The ways taken so far, by key."""
    return dict(_chosen)


def pin(ways: Mapping[Hashable, str]) -> None:
    """Takes these ways from here on, unmeasured: the `choices` of another process, so that this one computes alike."""
    _chosen.update(ways)


def _measured(ways: Mapping[str, Callable[[], object]]) -> str:
    """The name of the fastest way, by measurement. Raises what the last way raised if none has the memory it needs."""
    best = dict.fromkeys(ways, float("inf"))
    candidates = dict(ways)
    for _ in range(ROUNDS):
        for name, way in list(candidates.items()):
            try:
                best[name] = min(best[name], _seconds(way))
            except Exception as error:
                del candidates[name]
                if not (candidates and lacks_memory(error)):
                    raise
    return min(candidates, key=best.__getitem__)


def _seconds(way: Callable[[], object]) -> float:
    """How long one run takes, on the device too."""
    synchronize()
    start = time.perf_counter()
    way()
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    """Waits for the device, if the process uses one."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def lacks_memory(error: Exception) -> bool:
    """Whether a device, or torch's allocator on the CPU, had no memory left, or a Triton kernel asked for more shared
    memory than there is."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
    return known or type(error).__name__ == "OutOfResources"  # Triton's, which need not be installed
