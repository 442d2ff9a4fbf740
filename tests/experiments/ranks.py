"""Processes that stay, so that many checks pay once for importing torch: each calls what it is given as its rank."""

from __future__ import annotations

import contextlib
import io
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from experiments import distributed
from experiments import train as train_module
from experiments.config import compose_config
from experiments.data import Dataset
from experiments.distributed import ALONE, Process
from experiments.record import Record

PATIENCE = 120.0  # seconds that a call may take: a rank that waits for one that failed would wait for ever


@dataclass(frozen=True)
class Ranks:
    world_size: int
    connections: list[Connection]

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What function(process, *arguments) returns in each process, or the exception that it raises."""
        for connection in self.connections:
            connection.send((function, arguments))
        return [self._answer(rank) for rank in range(self.world_size)]

    def _answer(self, rank: int) -> Any:
        if not self.connections[rank].poll(PATIENCE):
            raise TimeoutError(f"rank {rank} of {self.world_size} did not answer")
        return self.connections[rank].recv()


@contextlib.contextmanager
def started(world_size: int) -> Iterator[Ranks]:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = get_context("spawn")
    pipes = [context.Pipe() for _ in range(world_size)]
    processes = [
        context.Process(target=serve, args=(rank, world_size, store.port, theirs), daemon=True)
        for rank, (_, theirs) in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    try:
        yield Ranks(world_size, [ours for ours, _ in pipes])
    finally:
        for process in processes:
            process.kill()
            process.join()


def serve(rank: int, world_size: int, port: int, connection: Connection) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=PATIENCE))
    call = 0
    while True:
        function, arguments = connection.recv()
        call += 1  # what a call left in the store is not the next one's
        process = Process(rank, world_size, dist.PrefixStore(f"call {call}", store))
        try:
            connection.send(function(process, *arguments))
        except BaseException as error:
            connection.send(error)


def doubled(data: Dataset) -> Dataset:
    """Numbers in float64."""
    train, test = ((split.x.double(), split.y) for split in (data.train, data.test))
    return Dataset(type(data.train)(*train), type(data.test)(*test), data.classes)


def train_exactly(process: Process, overrides: list[str], directory: Path) -> Record:
    """A run in float64."""
    load, build = train_module.load_data, train_module.build_model
    with (
        mock.patch.object(train_module, "load_data", lambda *arguments: doubled(load(*arguments))),
        mock.patch.object(train_module, "build_model", lambda *arguments: build(*arguments).double()),
    ):
        return train_module.train(compose_config(overrides), directory, process=process)


def alone(overrides: list[str], directory: Path) -> Record:
    return train_exactly(ALONE, overrides, directory)


def command(process: Process, arguments: list[str]) -> tuple[int, str, str]:
    """`python -m experiments.train` with these arguments: exit code, what it prints, and its errors."""
    code, out, err = 0, io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["experiments.train", *arguments]),
        mock.patch.object(train_module, "this_process", return_value=process),
        mock.patch.object(distributed, "this_process", return_value=process),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            train_module.start()
        except SystemExit as end:
            code = int(end.code or 0)
    return code, out.getvalue(), err.getvalue()
