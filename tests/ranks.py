"""Processes that run functions together, as the ranks of a process group over gloo. Starting them takes seconds: once
for all tests of a world size."""

from __future__ import annotations

import os
import tempfile
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

SECONDS = 120  # of one function: ranks that wait for each other would do so for half an hour


class Ranks:
    """`size` processes. Calling it runs a function of a module, with picklable arguments, on all of them."""

    def __init__(self, size: int):
        self.size = size
        self.folder = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("spawn")
        self.ends, self.processes = [], []
        for rank in range(size):
            here, there = context.Pipe()
            process = context.Process(target=serve, args=(rank, size, self.folder.name, there), daemon=True)
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
        self.folder.cleanup()


def serve(rank: int, size: int, folder: str, end: Connection) -> None:
    """Runs what comes through the pipe, until the process is killed."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{Path(folder) / 'store'}", rank=rank, world_size=size)
    while True:
        function, arguments = end.recv()
        torch.manual_seed(0)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                result = function(*arguments)
            end.send((None, result))
        except BaseException:
            end.send((traceback.format_exc(), None))
