"""Everything within this process, in tiny shapes; tests of fresh processes make their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from experiments.benchmarks import processes
from experiments.benchmarks.workloads import Settings


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)


@pytest.fixture
def settings() -> Settings:
    return Settings(quick=True)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """In place of fresh processes; the list is what was run."""
    calls: list[tuple[Any, ...]] = []

    def run(function: Any, *arguments: Any, limit: float, bounded: bool) -> Any:
        calls.append((function.__name__, *arguments))
        try:
            return function(*arguments)
        except Exception as error:
            raise processes.Failed(processes.words(error)) from error

    monkeypatch.setattr(processes, "fresh", run)
    return calls
