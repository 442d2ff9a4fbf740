"""Compiles the sources beside this file for the processor at hand, once per machine, with only a C++ compiler."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

SOURCES = Path(__file__).parent
FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fPIC", "-fopenmp", "-Wno-psabi")
# Whether a product is rounded before something is added to it. In a step it is, as in torch's, from which 200 steps of
# AdamW in float32 are otherwise further away than torch is from itself with another order of the examples.
CONTRACTION = {"outer_sum": "fast"}
# By what torch calls its own kernels for this processor; others compile for what every processor of their kind has.
INSTRUCTIONS = {
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"),
    "AVX2": ("-mavx2", "-mfma"),
}
LONGEST = 120  # seconds
DTYPES = ("float32", "float64", "bfloat16")
SYMBOLS = ("outer_sum_plan", *(f"{kernel}_{dtype}" for kernel in ("outer_sum", "adam") for dtype in DTYPES))


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels. None, with a warning, if compilation fails; None where there is no compiler."""
    command = compiler()
    if command is None:
        return None
    flags = (*FLAGS, *INSTRUCTIONS.get(torch.backends.cpu.get_cpu_capability(), ()))
    texts = [path.read_text() for path in sorted((*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")))]
    version = hashlib.sha256("\n".join((*texts, command, *flags, str(CONTRACTION))).encode()).hexdigest()[:16]
    try:
        with directory() as place:
            path = place / f"kernels-{version}.so"
            if not path.exists():
                build(command, flags, path)
            loaded = ctypes.CDLL(str(path))
            for name in SYMBOLS:
                getattr(loaded, name)
            return loaded
    except (AttributeError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip()
        warnings.warn(
            f"the kernels for weights of Linear layers and convolutions and for Adam's step could not be had and are "
            f"done without, more slowly. They are compiled by {command} (CXX) into $XDG_CACHE_HOME/gradstats or "
            f"~/.cache/gradstats ({type(error).__name__}: {reason.splitlines()[0] if reason else ''})",
            stacklevel=2,
        )
        return None


def compiler() -> str | None:
    """The C++ compiler, where one is and is known to share OpenMP with torch."""
    if not (sys.platform == "linux" and torch.backends.openmp.is_available()):
        return None
    return compiler_of_cpu()


def compiler_of_cpu() -> str | None:
    """The name of the machine's C++ compiler, None without one: what CXX says, or the first that is installed."""
    names = (os.environ.get("CXX"), "g++", "clang++", "cl" if sys.platform == "win32" else None)
    return next((name for name in names if name and shutil.which(name)), None)


@contextmanager
def directory() -> Iterator[Path]:
    """Where compiled kernels are kept for other processes, or one for this process alone if that is another user's
    or others may write there: what is there is executed."""
    home = os.environ.get("XDG_CACHE_HOME")
    kept = (Path(home) if home else Path.home() / ".cache") / "gradstats"
    kept.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = kept.stat()
    if status.st_uid == os.getuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        yield kept
    else:
        with tempfile.TemporaryDirectory() as name:
            yield Path(name)


def build(command: str, flags: tuple[str, ...], path: Path) -> None:
    """Other processes see the library whole or not at all."""
    with tempfile.TemporaryDirectory(dir=path.parent) as directory:
        linked, compiled = os.path.join(directory, "kernels.so"), []
        for source in sorted(SOURCES.glob("*.cpp")):
            compiled.append(os.path.join(directory, f"{source.stem}.o"))
            contraction = f"-ffp-contract={CONTRACTION.get(source.stem, 'off')}"
            run(command, *flags, contraction, "-c", str(source), "-o", compiled[-1])
        # Not linked against OpenMP: torch has it loaded, and a second one would be a second set of threads.
        run(command, "-shared", *compiled, "-o", linked)
        with open(linked, "rb") as file:
            os.fsync(file.fileno())  # half of it would end the process that loads it
        os.replace(linked, path)


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=LONGEST)
