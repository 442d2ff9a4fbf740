"""Compiles the sources beside this file for the processor at hand, each when it is first needed, once per machine, with
only a C++ compiler."""

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
from typing import Any, NamedTuple

import torch

SOURCES = Path(__file__).parent
TORCH = Path(torch.__file__).parent
FLAGS = ("-O3", "-fno-math-errno", "-fPIC", "-fopenmp", "-Wno-psabi")
# By what torch calls its own kernels for this processor; others compile for what every processor of their kind has.
INSTRUCTIONS = {
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"),
    "AVX2": ("-mavx2", "-mfma"),
}
LONGEST = 120  # seconds
BOOL, INT, LONG, ADDRESS = ctypes.c_bool, ctypes.c_int, ctypes.c_int64, ctypes.c_void_p


class Source(NamedTuple):
    """A file beside this one: what it is for, how it is compiled and linked, and the arguments of what is called."""

    purpose: str
    flags: tuple[str, ...]
    links: tuple[str, ...]
    symbols: dict[str, tuple[Any, ...]]


# In a step a product is rounded before something is added to it, as in torch's, from which 200 steps of AdamW in
# float32 are otherwise further away than torch is from itself with another order of the examples.
KERNELS = {
    "outer_sum": Source(
        "weights of Linear layers and convolutions",
        ("-std=c++17", "-ffp-contract=fast"),
        (),
        {
            "outer_sum_tasks": (ADDRESS, LONG),
            **{f"outer_sum_{dtype}": (*[ADDRESS] * 6, INT) for dtype in ("float32", "float64", "bfloat16")},
        },
    ),
    "adam": Source(
        "Adam's step",
        ("-std=c++20", "-ffp-contract=off", "-isystem", str(TORCH / "include")),  # what torch's headers ask for
        (f"-L{TORCH / 'lib'}", "-lc10"),
        {"adam": (INT, INT, INT, BOOL, LONG, ADDRESS, ADDRESS, INT, LONG)},
    ),
}


@functools.cache
def library(name: str) -> ctypes.CDLL | None:
    """The compiled kernels of a source. None, with a warning, if compilation fails; None where there is no compiler."""
    command = compiler()
    if command is None:
        return None
    purpose, own, links, symbols = KERNELS[name]
    flags = (*FLAGS, *own, *INSTRUCTIONS.get(torch.backends.cpu.get_cpu_capability(), ()))
    try:
        texts = [path.read_text() for path in (SOURCES / f"{name}.cpp", *sorted(SOURCES.glob("*.h")))]
        version = hashlib.sha256("\n".join((*texts, command, *flags, *links, torch.__version__)).encode()).hexdigest()
        with directory() as place:
            path = place / f"{name}-{version[:16]}.so"
            if not path.exists():
                build(command, name, flags, links, path)
            loaded = ctypes.CDLL(str(path))
            for symbol, arguments in symbols.items():
                getattr(loaded, symbol).argtypes = arguments
            return loaded
    except (AttributeError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip()
        warnings.warn(
            f"the kernel for {purpose} could not be had and is done without, more slowly. It is compiled by {command} "
            f"(CXX) into $XDG_CACHE_HOME/gradstats or ~/.cache/gradstats ({type(error).__name__}: "
            f"{reason.splitlines()[0] if reason else ''})",
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


def build(command: str, name: str, flags: tuple[str, ...], links: tuple[str, ...], path: Path) -> None:
    """Other processes see the library whole or not at all."""
    with tempfile.TemporaryDirectory(dir=path.parent) as directory:
        compiled, linked = os.path.join(directory, f"{name}.o"), os.path.join(directory, f"{name}.so")
        run(command, *flags, "-c", str(SOURCES / f"{name}.cpp"), "-o", compiled)
        # Not linked against OpenMP: torch has it loaded, and a second one would be a second set of threads.
        run(command, "-shared", compiled, *links, "-o", linked)
        with open(linked, "rb") as file:
            os.fsync(file.fileno())  # half of it would end the process that loads it
        os.replace(linked, path)


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=LONGEST)
