"""Ranks that are processes of one run, and what they are given to do."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist

from experiments import distributed
from experiments import train as train_module
from experiments.config import compose_config
from experiments.data import Dataset
from experiments.distributed import ALONE, Process
from experiments.record import Record


def as_process(rank: int, world_size: int, store: dist.Store) -> Callable[..., Any]:
    """Functions take the Process that a rank is, first; what they raise is returned."""
    calls = count()

    def call(function: Callable[..., Any], *arguments: Any) -> Any:
        # What a call left in the store is not the next one's.
        process = Process(rank, world_size, dist.PrefixStore(f"call {next(calls)}", store))
        try:
            return function(process, *arguments)
        except BaseException as error:
            return error

    return call


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
