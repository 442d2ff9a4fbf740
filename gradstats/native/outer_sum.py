"""Sums over examples of the contributions to a weight, on the CPU: outer_sum.cpp."""

from __future__ import annotations

import ctypes
from collections.abc import Collection

import torch
from torch import Tensor

from gradstats import native
from gradstats.sums import Reduction, accumulation_dtype, addressable, present

KERNELS = {
    torch.float32: "outer_sum_float32",
    torch.float64: "outer_sum_float64",
    torch.bfloat16: "outer_sum_bfloat16",
}


def serves(d: Tensor, a: Tensor) -> bool:
    """Whether there is a kernel for them: plain tensors on the CPU, and a compiler at the first call."""
    if not native.enabled or torch.compiler.is_compiling():
        return False
    plain = addressable(d, a) and d.device.type == a.device.type == "cpu"
    known = plain and d.dtype == a.dtype and d.dtype in KERNELS and 0 not in (*d.shape, *a.shape)
    return known and native.library("outer_sum") is not None


def sums(d: Tensor, a: Tensor, names: Collection[str]) -> Reduction:
    """Of c_b = sum_t d_bt a_bt^T, d (n, t, o) and a (n, t, i): sum_b c_b, and "sum_of_squares" and "squared_norms" as
    far as `names` has them (one of them at least). Sums are float32, or float64 for float64.

    About the time of torch's matmul for sum_b c_b alone: c_b stays in registers, or with one position what is packed
    for one matmul is squared for the other. The same bit for bit for any number of threads.
    """
    kernels = native.library("outer_sum")
    assert kernels is not None
    (n, t, o), i = d.shape, a.shape[2]
    dtype = accumulation_dtype(d.dtype)
    sizes = (ctypes.c_int64 * 10)(n, t, o, i, *d.stride(), *a.stride())
    gradient, squares, norms = torch.empty(o, i, dtype=dtype), None, None
    if "sum_of_squares" in names:
        squares = torch.empty(o, i, dtype=dtype)
    if "squared_norms" in names:
        norms = torch.empty(kernels.outer_sum_tasks(sizes, dtype.itemsize), n, dtype=dtype)
    addresses = (pointer(tensor) for tensor in (d, a, gradient, squares, norms))
    if not getattr(kernels, KERNELS[d.dtype])(sizes, *addresses, torch.get_num_threads()):
        raise MemoryError(f"outer_sum has no memory to pack operands of shapes {tuple(d.shape)} and {tuple(a.shape)}")
    norms = norms if norms is None else norms.sum(0)
    return gradient.to(d.dtype), present({"sum_of_squares": squares, "squared_norms": norms})


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
