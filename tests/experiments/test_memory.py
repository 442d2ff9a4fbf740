"""The count of living bytes, and what it says of a step with statistics."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from experiments import memory
from experiments.memory import MIB, LivingBytes

SMALL = {"layers": 2, "width": 32, "heads": 2, "words": 3000, "positions": 16, "batch_size": 8}


def test_storages_count_once_and_as_long_as_they_live() -> None:
    with LivingBytes() as counter:
        a = torch.zeros(1000)
        assert counter.now == 4000
        view = a.view(10, 100)
        assert counter.now == 4000
        b = a + 1
        assert counter.now == 8000
        del a, view
        assert counter.now == 4000
        del b
    assert counter.now == 0 and counter.peak == 8000


def test_a_step_of_a_tied_gpt_stays_within_one_buffer() -> None:
    found = memory.measure(**SMALL)
    assert found.plain <= found.attached <= found.limit


def test_gradients_of_every_example_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bar can fail: the vmap engine keeps a gradient for every example."""
    original = memory.gradstats.attach
    monkeypatch.setattr(memory.gradstats, "attach", lambda model: original(model, engine="vmap"))
    found = memory.measure(**SMALL)
    assert found.attached > found.limit


def test_figures_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "new" / "memory.json"
    shape = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    monkeypatch.setattr("sys.argv", ["memory", *shape, "--output", str(output)])
    memory.main()
    written = json.loads(output.read_text())
    assert written["plain"] <= written["attached"] <= written["limit"]
    assert written["parameters"] * MIB == pytest.approx(4 * (3000 * 32 + 16 * 32 + 2 * 12768 + 64), rel=0.02)
