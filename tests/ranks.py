"""Processes that run functions together, as ranks that meet at a store. Starting them takes seconds: once for all tests
of a world size."""

from __future__ import annotations

import os
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any, Self

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

SECONDS = 120  # of one function: ranks that wait for each other would do so for half an hour

Call = Callable[..., Any]  # of a function and its arguments
Join = Callable[[int, int, dist.Store], Call]  # rank, size


def in_group(rank: int, size: int, store: dist.Store) -> Call:
    """Ranks of one process group over gloo."""
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    return lambda function, *arguments: function(*arguments)


class Ranks:
    """`size` processes. Calling it runs a function of a module, with picklable arguments, on all of them.

    `join` is called first, in each process, and says how functions are called there.
    """

    def __init__(self, size: int, join: Join = in_group):
        self.size = size
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        context = multiprocessing.get_context("spawn")
        self.ends, self.processes = [], []
        for rank in range(size):
            here, there = context.Pipe()
            arguments = (rank, size, self.store.port, join, there)
            process = context.Process(target=serve, args=arguments, daemon=True)
            process.start()
            self.ends.append(here)
            self.processes.append(process)

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What it returns, by rank. Raises: AssertionError with the tracebacks of ranks that raised."""
        for end in self.ends:
            end.send((function, arguments))
        answers = []
        for rank, end in enumerate(self.ends):
            assert end.poll(SECONDS), f"rank {rank} of {self.size} does not return from {function.__name__}"
            answers.append(end.recv())
        failed = [f"rank {rank}:\n{text}" for rank, (text, _) in enumerate(answers) if text]
        assert not failed, "\n".join(failed)
        return [result for _, result in answers]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def serve(rank: int, size: int, port: int, join: Join, end: Connection) -> None:
    """Runs what comes through the pipe, until the process is killed."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    call = join(rank, size, dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=SECONDS)))
    while True:
        function, arguments = end.recv()
        torch.manual_seed(0)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                result = call(function, *arguments)
            end.send((None, result))
        except BaseException:
            end.send((traceback.format_exc(), None))
