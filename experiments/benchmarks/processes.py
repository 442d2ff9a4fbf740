"""Fresh processes: what one leaves in memory, in caches of kernels or in a broken state, no other one meets."""

from __future__ import annotations

import multiprocessing
import os
import re
import resource
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

LIBRARIES = ("torch", "torch.profiler", "experiments.benchmarks.measure", "opacus.grad_sample", "backpack.extensions")
SHARE = 0.9  # of the memory that is free: beyond that the system would kill, and not this process only
GRACE = 5.0  # seconds in which a process that has answered may clear up behind itself
LONGEST = 70  # characters of an error


class Failed(Exception):
    """A process did not answer; the text says why, in a few words."""


def fresh(function: Callable[..., Any], *arguments: Any, limit: float, bounded: bool) -> Any:
    """function(*arguments) in a process of its own, forked from one that has imported the libraries and nothing more.

    `bounded` by the free memory: not for CUDA, which reserves far more addresses than it uses. Raises: Failed if it
    fails, dies, or takes more than `limit` seconds.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(LIBRARIES))
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=answer, args=(sending, function, arguments, bounded))
    process.start()
    sending.close()
    try:
        if not receiving.poll(limit):
            raise Failed(f"takes more than {limit:g} s")
        try:
            failed, found = receiving.recv()
            process.join(GRACE)
        except EOFError:
            process.join(GRACE)
            raise Failed("killed, probably for memory" if process.exitcode == -9 else "crashed") from None
    finally:
        process.kill()
        process.join()
        receiving.close()
    if failed:
        raise Failed(found)
    return found


def answer(sending: Connection, function: Callable[..., Any], arguments: tuple[Any, ...], bounded: bool) -> None:
    """Sends (failed, what was found or why not)."""
    quiet()
    if bounded:
        limit_memory()
    try:
        result: tuple[bool, Any] = (False, function(*arguments))
    except Exception as error:
        result = (True, words(error))
    sending.send(result)


def quiet() -> None:
    """Libraries' warnings and logs are no part of the progress that the terminal shows."""
    warnings.simplefilter("ignore")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


def limit_memory() -> None:
    """An allocation beyond the free memory is an error then, and not the end of some process."""
    told = Path("/proc/meminfo")
    if told.exists() and (found := re.search(r"MemAvailable:\s*(\d+) kB", told.read_text())):
        most = int(SHARE * 1024 * int(found[1]))
        resource.setrlimit(resource.RLIMIT_DATA, (most, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def words(error: Exception) -> str:
    """An error in a few words."""
    if isinstance(error, ImportError) or isinstance(error.__cause__, ImportError):
        return "not installed"
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or re.search("out of memory|allocate memory|not enough memory", text):
        return "out of memory"
    short = text[:LONGEST].rpartition(" ")[0] + " ..." if len(text) > LONGEST else text
    return short or type(error).__name__
