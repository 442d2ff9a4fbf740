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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradstats.optim.update import Phase, Update

Named = dict[str, Tensor]
Columns = dict[str, list[Tensor]]
Kernel = Callable[[Named], None]  # updates what it writes in place

# Elements of a piece. On the CPU a step's ten tensors of them stay in a second-level cache; elsewhere a launch is what
# costs.
BLOCK = {"cpu": 1 << 15}
ELSEWHERE = 1 << 24
# Below this a call costs more than copying the tensor to others and back.
SMALL = 1 << 11
# From this many elements on, compiling (seconds, once) is worth it without being asked for.
WORTH_COMPILING = 1 << 20


def run(update: Update, phase: Phase, columns: Columns, scalars: Mapping[str, Any], compiled: bool) -> None:
    """One phase of an update of parameters of one device and dtype, given with their gradients, sums and buffers."""
    writes = update.writes(phase)
    device = columns["parameter"][0].device
    kernel = (compiled_kernel if compiled else plain_kernel)(update, phase, columns, scalars)
    largest = None if compiled else BLOCK.get(device.type, ELSEWHERE)
    together: list[Named] = []
    size = 0
    names = tuple(columns)
    for row in zip(*columns.values(), strict=True):
        flat = flattened(names, row, writes)
        if flat is None:
            plain_kernel(update, phase, columns, scalars)(dict(zip(names, row, strict=True)))
            continue
        n = flat["parameter"].numel()
        if n > (largest or SMALL):
            for piece in pieces(flat, largest or n):
                kernel(piece)
            continue
        together.append(flat)
        size += n
        if size > (largest or ELSEWHERE):
            run_together(kernel, together, writes)
            together, size = [], 0
    if together:
        run_together(kernel, together, writes)


def pieces(flat: Named, largest: int) -> Iterator[Named]:
    n = flat["parameter"].numel()
    if n <= largest:
        yield flat
        return
    for start in range(0, n, largest):
        yield {name: t[start : start + largest] for name, t in flat.items()}


def run_together(kernel: Kernel, parts: Sequence[Named], writes: Iterable[str]) -> None:
    """Many small tensors as one."""
    if len(parts) == 1:
        kernel(parts[0])
        return
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    kernel(joined)
    sizes = [part["parameter"].numel() for part in parts]
    for name in writes:
        torch._foreach_copy_([part[name] for part in parts], joined[name].split(sizes))


def flattened(names: Sequence[str], row: Sequence[Tensor], writes: Sequence[str]) -> Named | None:
    """The same in one dimension, in the order in which the parameter lies in memory; None if there is no such view of
    what is written."""
    if all(t.is_contiguous() for t in row):
        return {name: t.view(-1) for name, t in zip(names, row, strict=True)}
    tensors = dict(zip(names, row, strict=True))
    p = tensors["parameter"]
    strides, n = p.stride(), p.numel()
    dense = torch._prims_common.is_non_overlapping_and_dense_or_false(p)
    if not dense or any(tensors[name].stride() != strides for name in writes):
        return None
    as_p = (t if t.stride() == strides else torch.empty_like(p, dtype=t.dtype).copy_(t) for t in row)
    return {name: t.as_strided((n,), (1,)) for name, t in zip(names, as_p, strict=True)}


def plain_kernel(update: Update, phase: Phase, columns: Columns, scalars: Mapping[str, Any]) -> Kernel:
    def kernel(tensors: Named) -> None:
        for name, value in update(tensors, scalars, phase).items():
            tensors[name].copy_(value)

    return kernel


def compiled_kernel(update: Update, phase: Phase, columns: Columns, scalars: Mapping[str, Any]) -> Kernel:
    names, numbers = tuple(columns), tuple(scalars)
    dtypes = tuple(column[0].dtype for column in columns.values())
    device = columns["parameter"][0].device
    artifact = compile_update(update, phase, names, dtypes, numbers, device.type)
    if artifact is None:
        return plain_kernel(update, phase, columns, scalars)
    k = as_tensor(scalars, device)

    def kernel(tensors: Named) -> None:
        artifact(*[tensors[name] for name in names], k)

    return kernel


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
