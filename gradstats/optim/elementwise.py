"""How an Update is run over all parameters: as one compiled kernel, or block by block in plain torch.

Elements do not see each other, so that tensors are taken flat: one kernel serves all shapes. In plain torch small
tensors are put together, and large ones taken apart where that keeps them in cache.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from gradstats.kernels import available
from gradstats.native.build import compiler_of_cpu
from gradstats.optim.update import Phase, Update

Columns = dict[str, list[Tensor]]  # "parameter" first
Row = Sequence[Tensor]  # one parameter's, in the order of the columns
Kernel = Callable[..., Any]  # of tensors; updates what it writes in place

# Elements, in plain torch on the CPU: those that a thread takes at a time, so that a step's ten tensors of them stay in
# cache, and those up to which tensors are put together, since calls cost more than copying them there and back.
BLOCK = 1 << 17
SMALL = 1 << 15
LARGEST = 1 << 24  # of a piece anywhere
# A compiled kernel takes so many parameters at once, since a call costs more than a small one's elements.
ROWS = 4
# From this many elements on, compiling (seconds, once) is worth it without being asked for.
WORTH_COMPILING = 1 << 20


def run(
    update: Update, phase: Phase, columns: Columns, scalars: Mapping[str, Any], compiled: bool, ready: bool = False
) -> None:
    """One phase of an update of parameters of one device and dtype, given with their gradients, sums and buffers.

    compiled: by a kernel made for the equation, in seconds; ready: by one that is there for it, if there is.
    """
    on_gpu = compiled and available(columns["parameter"][0])
    if ready and not on_gpu:
        from gradstats.native import adam as native_adam

        served = native_adam.serves(update, columns["parameter"][0])
        if served and native_adam.step(update, phase, columns, scalars):
            return
    names, device = tuple(columns), columns["parameter"][0].device
    written = [names.index(name) for name in update.writes(phase)]
    plain = plain_kernel(update, phase, names, scalars)
    rows = flat_rows(columns, written, plain)
    if on_gpu:
        from gradstats.kernels import adam

        if adam.serves(update, phase, columns):
            adam.step(names, list(rows), scalars)
            # Tells autograd of what was written: a graph that saved it before is refused.
            torch.autograd.graph.increment_version(chain.from_iterable(columns[n] for n in update.writes(phase)))
            return
    kernels = compiled_kernels(update, phase, columns, scalars) if compiled else None
    if kernels is not None:
        run_compiled(kernels, rows, as_tensor(scalars, device))
    elif device.type == "cpu":
        run_plain(plain, rows, written, SMALL, BLOCK * torch.get_num_threads())
    else:
        run_plain(plain, rows, written, LARGEST, LARGEST)


def run_compiled(kernels: Mapping[int, Kernel], rows: Iterable[Row], k: Tensor) -> None:
    """`kernels` by the number of rows that they take, 1 among them."""
    most = max(kernels)
    waiting: list[Row] = []
    for row in rows:
        for piece in pieces(row, LARGEST):
            waiting.append(piece)
            if len(waiting) == most:
                kernels[most](*chain.from_iterable(waiting), k)
                waiting = []
    for row in waiting:
        kernels[1](*row, k)


def run_plain(kernel: Kernel, rows: Iterable[Row], written: Sequence[int], small: int, largest: int) -> None:
    together: list[Row] = []
    size = 0
    for row in rows:
        n = row[0].numel()
        if n > small:
            for piece in pieces(row, largest):
                kernel(*piece)
        else:
            together.append(row)
            size += n
            if size > small:
                run_together(kernel, together, written)
                together, size = [], 0
    if together:
        run_together(kernel, together, written)


def pieces(row: Row, largest: int) -> Iterable[Row]:
    n = row[0].numel()
    if n <= largest:
        return (row,)
    return ([t[start : start + largest] for t in row] for start in range(0, n, largest))


def run_together(kernel: Kernel, rows: Sequence[Row], written: Sequence[int]) -> None:
    """Many small tensors as one."""
    if len(rows) == 1:
        kernel(*rows[0])
        return
    columns = list(zip(*rows, strict=True))
    joined = [torch.cat(column) for column in columns]
    kernel(*joined)
    sizes = [t.numel() for t in columns[0]]
    for i in written:
        torch._foreach_copy_(columns[i], joined[i].split(sizes))


def flat_rows(columns: Columns, written: Sequence[int], otherwise: Kernel) -> Iterator[Row]:
    """Every parameter's row in one dimension. What has no such view goes to `otherwise`."""
    for row in zip(*columns.values(), strict=True):
        flat = flattened(row, written)
        if flat is None:
            otherwise(*row)
        else:
            yield flat


def flattened(row: Row, written: Sequence[int]) -> Row | None:
    """The same in one dimension, in the order in which the first, the parameter, lies in memory; None if there is no
    such view of what is written."""
    if all(map(Tensor.is_contiguous, row)):
        return [t if t.dim() == 1 else t.ravel() for t in row]  # a view, sooner made than view(-1)
    p = row[0]
    dense = torch._prims_common.is_non_overlapping_and_dense_or_false(p)
    if not dense or any(row[i].stride() != p.stride() for i in written):
        return None
    as_p = (t if t.stride() == p.stride() else torch.empty_like(p, dtype=t.dtype).copy_(t) for t in row)
    return [t.as_strided((p.numel(),), (1,)) for t in as_p]


def plain_kernel(update: Update, phase: Phase, names: Sequence[str], scalars: Mapping[str, Any]) -> Kernel:
    def kernel(*row: Tensor) -> None:
        tensors = dict(zip(names, row, strict=True))
        for name, value in update(tensors, scalars, phase).items():
            tensors[name].copy_(value)

    return kernel


def compiled_kernels(
    update: Update, phase: Phase, columns: Columns, scalars: Mapping[str, Any]
) -> Mapping[int, Kernel] | None:
    """Of one row, and of several where there are as many."""
    dtypes = tuple(column[0].dtype for column in columns.values())
    if any(t.dtype != dtype for column, dtype in zip(columns.values(), dtypes, strict=True) for t in column):
        return None  # the kernel takes addresses, not values
    parameters = columns["parameter"]
    kernels: dict[int, Kernel] = {}
    for rows in (1, ROWS) if len(parameters) >= ROWS else (1,):
        kernel = compile_update(update, phase, tuple(columns), dtypes, tuple(scalars), parameters[0].device.type, rows)
        if kernel is None:
            return None
        kernels[rows] = kernel
    return kernels


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
    rows: int,
) -> Kernel | None:
    """One kernel for so many rows of flat tensors, each of any length, and the scalars. It is without the guards of
    torch.compile, which cost more than a small tensor's step. None, with a warning, if compilation fails."""
    from torch._inductor import standalone_compile
    from torch.fx.experimental.proxy_tensor import make_fx

    def flat(*arguments: Tensor) -> tuple[()]:
        kernel = plain_kernel(update, phase, names, dict(zip(numbers, arguments[-1].unbind(), strict=True)))
        for i in range(rows):
            kernel(*arguments[i * len(names) : (i + 1) * len(names)])
        return ()

    # A length is a symbol, told from others by its example, which decides whether the kernel is made for several
    # threads.
    sizes = [WORTH_COMPILING + 8 * i for i in range(1, rows + 1)]
    examples = [torch.empty(size, dtype=dtype, device=device) for size in sizes for dtype in dtypes]
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
        return compiler_of_cpu()
    return "triton" if importlib.util.find_spec("triton") else None
