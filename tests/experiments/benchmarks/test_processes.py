"""A process of its own for each measurement, and what becomes of those that fail."""

from __future__ import annotations

import math
import os
import resource
import time

import pytest

from experiments.benchmarks.processes import LONGEST, Failed, fresh, words


def test_every_call_has_its_own_process() -> None:
    found = {fresh(os.getpid, limit=60, bounded=True) for _ in range(2)}
    assert len(found) == 2 and os.getpid() not in found


def test_failures_are_told_in_a_few_words() -> None:
    with pytest.raises(Failed, match=r"^math domain error$|^expected a nonnegative input"):
        fresh(math.sqrt, -1.0, limit=60, bounded=True)
    with pytest.raises(Failed, match=r"^takes more than 0\.5 s$"):
        fresh(time.sleep, 60, limit=0.5, bounded=True)
    with pytest.raises(Failed, match=r"^crashed$"):
        fresh(os._exit, 3, limit=60, bounded=True)
    with pytest.raises(Failed, match=r"^crashed$"):
        fresh(os.abort, limit=60, bounded=True)


def test_memory_is_bounded_by_what_is_free() -> None:
    mine = resource.getrlimit(resource.RLIMIT_DATA)
    assert fresh(resource.getrlimit, resource.RLIMIT_DATA, limit=60, bounded=False) == mine
    soft, hard = fresh(resource.getrlimit, resource.RLIMIT_DATA, limit=60, bounded=True)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < soft < total and hard == mine[1]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ModuleNotFoundError("No module named 'backpack'"), "not installed"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9"), "out of memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate 20 GiB"), "out of memory"),
        (MemoryError(), "out of memory"),
        (ValueError("one\n  two"), "one two"),
        (NotImplementedError(), "NotImplementedError"),
    ],
)
def test_words(error: Exception, expected: str) -> None:
    assert words(error) == expected


def test_long_errors_are_cut_between_words() -> None:
    cut = words(ValueError("word " * 100))
    assert cut.endswith("word ...") and len(cut) <= LONGEST + 4


def test_an_import_that_fails_below_is_not_installed() -> None:
    error = RuntimeError("engine 'opacus' needs Opacus")
    error.__cause__ = ImportError("opacus")
    assert words(error) == "not installed"
