"""Kernels are compiled where there is a device, and interpreted elsewhere (tests/conftest.py)."""

import importlib.util

import numpy as np
import pytest
import torch

if importlib.util.find_spec("triton") is None:  # there is none but for Linux
    collect_ignore_glob = ["test_*.py"]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _device(monkeypatch):
    """One that holds three times what a multiprocessor does."""
    monkeypatch.setattr("gradstats.kernels.multiprocessors", lambda device: 3)


@pytest.fixture(autouse=True)
def _interpreted_products(monkeypatch):
    """Triton's interpreter multiplies the bits of bfloat16 as integers."""
    if DEVICE == "cuda":
        return
    from triton.language import bfloat16, float32
    from triton.runtime.interpreter import InterpreterBuilder

    original = InterpreterBuilder.create_dot

    def create_dot(self, a, b, *rest):
        a, b = (self.cast_impl(x, float32) if x.dtype.scalar == bfloat16 else x for x in (a, b))
        return original(self, a, b, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


@pytest.fixture(autouse=True)
def _overflow_is_infinity():
    """As on a device, not a warning."""
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        yield
