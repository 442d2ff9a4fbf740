"""How an Update is run over all parameters: as one compiled kernel, or block by block in plain torch.

Elements do not see each other, so that tensors are taken flat: one kernel serves all shapes, small tensors are put
together, and large ones taken apart where that keeps them in cache.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradstats.optim.update import Phase, Update

Columns = dict[str, list[Tensor]]  # "parameter" first
Row = Sequence[Tensor]  # one parameter's, in the order of the columns
Kernel = Callable[[Row], Any]  # updates what it writes in place

# Elements of a piece. On the CPU a step's ten tensors of them stay in a second-level cache; elsewhere a launch is what
# costs.
BLOCK = {"cpu": 1 << 15}
ELSEWHERE = 1 << 24
# From this many elements on, compiling (seconds, once) is worth it without being asked for.
WORTH_COMPILING = 1 << 20


def run(update: Update, phase: Phase, columns: Columns, scalars: Mapping[str, Any], compiled: bool) -> None:
    """One phase of an update of parameters of one device and dtype, given with their gradients, sums and buffers."""
    names = tuple(columns)
    written = [names.index(name) for name in update.writes(phase)]
    plain = plain_kernel(update, phase, names, scalars)
    kernel = (compiled_kernel(update, phase, columns, scalars) if compiled else None) or plain
    device = columns["parameter"][0].device.type
    largest = BLOCK.get(device, ELSEWHERE)
    # A compiled kernel's call costs less than copying small tensors together and back.
    alone, largest = (largest, largest) if kernel is plain else (0, ELSEWHERE)
    together: list[Row] = []
    size = 0
    for row in zip(*columns.values(), strict=True):
        flat = flattened(row, written)
        n = row[0].numel()
        if flat is None:
            plain(row)
        elif n > alone:
            for start in range(0, n, largest):
                kernel(flat if n <= largest else [t[start : start + largest] for t in flat])
        else:
            together.append(flat)
            size += n
            if size > largest:
                run_together(kernel, together, written)
                together, size = [], 0
    if together:
        run_together(kernel, together, written)


def run_together(kernel: Kernel, rows: Sequence[Row], written: Sequence[int]) -> None:
    """Many small tensors as one."""
    if len(rows) == 1:
        kernel(rows[0])
        return
    columns = list(zip(*rows, strict=True))
    joined = [torch.cat(column) for column in columns]
    kernel(joined)
    sizes = [t.numel() for t in columns[0]]
    for i in written:
        torch._foreach_copy_(columns[i], joined[i].split(sizes))


def flattened(row: Row, written: Sequence[int]) -> Row | None:
    """The same in one dimension, in the order in which the first, the parameter, lies in memory; None if there is no
    such view of what is written."""
    if all(map(Tensor.is_contiguous, row)):
        return [t if t.dim() == 1 else t.view(-1) for t in row]
    p = row[0]
    dense = torch._prims_common.is_non_overlapping_and_dense_or_false(p)
    if not dense or any(row[i].stride() != p.stride() for i in written):
        return None
    as_p = (t if t.stride() == p.stride() else torch.empty_like(p, dtype=t.dtype).copy_(t) for t in row)
    return [t.as_strided((p.numel(),), (1,)) for t in as_p]


def plain_kernel(update: Update, phase: Phase, names: Sequence[str], scalars: Mapping[str, Any]) -> Kernel:
    def kernel(row: Row) -> None:
        tensors = dict(zip(names, row, strict=True))
        for name, value in update(tensors, scalars, phase).items():
            tensors[name].copy_(value)

    return kernel


def compiled_kernel(update: Update, phase: Phase, columns: Columns, scalars: Mapping[str, Any]) -> Kernel | None:
    dtypes = tuple(column[0].dtype for column in columns.values())
    if any(t.dtype != dtype for column, dtype in zip(columns.values(), dtypes, strict=True) for t in column):
        return None  # the kernel takes addresses, not values
    device = columns["parameter"][0].device
    artifact = compile_update(update, phase, tuple(columns), dtypes, tuple(scalars), device.type)
    if artifact is None:
        return None
    k = as_tensor(scalars, device)
    return lambda row: artifact(*row, k)


def as_tensor(scalars: Mapping[str, Any], device: torch.device) -> Tensor:
    """All scalars in one tensor, copied to the device at once; those that are tensors stay on theirs."""
    values = list(scalars.values())
    k = torch.tensor([0.0 if isinstance(v, Tensor) else v for v in values], dtype=torch.float64)
    k = k.to(device, non_blocking=True)
    for i, value in enumerate(values):
        if isinstance(value, Tensor):
            k[i] = value
    return k


@functools.cache
def compile_update(
    update: Update,
    phase: Phase,
    names: tuple[str, ...],
    dtypes: tuple[torch.dtype, ...],
    numbers: tuple[str, ...],
    device: str,
) -> Callable[..., Any] | None:
    """One kernel for flat tensors of any length, without the guards of torch.compile, which cost more than a small
    tensor's step. None, with a warning, if compilation fails."""
    from torch._inductor import standalone_compile
    from torch.fx.experimental.proxy_tensor import make_fx

    def flat(*arguments: Tensor) -> tuple[()]:
        tensors, k = dict(zip(names, arguments[:-1], strict=True)), arguments[-1]
        new = update(tensors, dict(zip(numbers, k.unbind(), strict=True)), phase)
        for name, value in new.items():
            tensors[name].copy_(value)
        return ()

    # The length is a symbol, whose example decides whether the kernel is made for several threads.
    examples = [torch.zeros(WORTH_COMPILING + 8, dtype=dtype, device=device) for dtype in dtypes]
    k = torch.ones(len(numbers), dtype=torch.float64, device=device)
    try:
        with torch.no_grad():
            graph = make_fx(flat, tracing_mode="symbolic")(*examples, k)
            # Otherwise the number of threads would be the one of the moment of compilation.
            options = {"config_patches": {"cpp.dynamic_threads": True}}
            return standalone_compile(graph, [*examples, k], dynamic_shapes="from_graph", options=options)
    except Exception as error:
        warnings.warn(
            f"{type(update).__name__} could not be compiled and runs in plain torch ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else ''}); compiled=False says so from the start",
            stacklevel=2,
        )
        return None


@functools.cache
def compiler(device: str) -> str | None:
    """What would compile for a device: the C++ compiler's or Triton's name, None without one."""
    if device == "cpu":
        names = (os.environ.get("CXX"), "g++", "clang++", "cl")
        return next((name for name in names if name and shutil.which(name)), None)
    return "triton" if importlib.util.find_spec("triton") else None
