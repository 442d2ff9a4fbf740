"""Compiles outer_sum.cpp for the processor at hand, once per machine, with nothing but a C++ compiler."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("outer_sum.cpp")
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fPIC", "-fopenmp", "-Wno-psabi")
# By what torch calls its own kernels for this processor; others compile for what every processor of their kind has.
INSTRUCTIONS = {
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"),
    "AVX2": ("-mavx2", "-mfma"),
}
LONGEST = 120  # seconds


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels. None, with a warning, if compilation fails; None where there is no compiler."""
    command = compiler()
    if command is None:
        return None
    flags = (*FLAGS, *INSTRUCTIONS.get(torch.backends.cpu.get_cpu_capability(), ()))
    version = hashlib.sha256("\n".join((SOURCE.read_text(), command, *flags)).encode()).hexdigest()[:16]
    try:
        directory = cache_directory()
        path = directory / f"outer_sum-{version}.so"
        if not path.exists():
            build(command, flags, path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        warnings.warn(
            f"the kernel for Linear layers with positions could not be compiled by {command} and is done without, "
            f"which is slower ({type(error).__name__}: {reason.strip().splitlines()[0] if reason.strip() else ''})",
            stacklevel=2,
        )
        return None


def compiler() -> str | None:
    """The C++ compiler, where one is and is known to share OpenMP with torch."""
    if not (sys.platform == "linux" and torch.backends.openmp.is_available()):
        return None
    return next((name for name in (os.environ.get("CXX"), "g++", "clang++") if name and shutil.which(name)), None)


def cache_directory() -> Path:
    """Where compiled kernels are kept for other processes: nobody else may write there, since they are executed."""
    home = os.environ.get("XDG_CACHE_HOME")
    directory = (Path(home) if home else Path.home() / ".cache") / "gradstats"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    return directory


def build(command: str, flags: tuple[str, ...], path: Path) -> None:
    """Other processes see the library whole or not at all."""
    with tempfile.TemporaryDirectory(dir=path.parent) as directory:
        compiled, linked = (os.path.join(directory, name) for name in ("kernels.o", "kernels.so"))
        run(command, *flags, "-c", str(SOURCE), "-o", compiled)
        # Not linked against OpenMP: torch has it loaded, and a second one would be a second set of threads.
        run(command, "-shared", compiled, "-o", linked)
        os.replace(linked, path)


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=LONGEST)
