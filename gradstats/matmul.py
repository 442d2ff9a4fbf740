"""Matmuls that serve a statistic alone: they need not be computed as the gradient's are.

    product(a, b)                    as exact as the gradient, by the fastest library at hand
    product(a, b, torch.bfloat16)    a and b rounded to bfloat16, the sum over k in float32

attach(model, statistics_dtype=torch.bfloat16) asks for the second, and gets it where the device has instructions for
it. A factor is off by 2^-8 of itself at most, and so is the result where the device rounds it too. Only sums of
positive terms are to be computed so: theirs is an error of three of these at most, and where terms cancel, there is no
bound.

bfloat16 has the exponents of float32, but half as many of them are left for squares, and what is below them may be
flushed to zero: `matched` takes d and a to one magnitude first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from gradstats.choice import fastest, unmeasured

# The largest relative error of a sum of positive terms: both factors and the result are rounded.
ROUNDING = {torch.bfloat16: 3 * 2.0**-8}

# Names of the instructions among torch.cpu.get_capabilities(); without them bfloat16 is slower than float32.
BFLOAT16_INSTRUCTIONS = ("amx_bf16", "avx512_bf16")

_forced = False


def product(a: Tensor, b: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """a (..., m, k) times b (..., k, n), with factors in `dtype` where `rounds` says so; in a's dtype."""
    if dtype is not None and rounds(a.device, dtype):
        return rounded(a.to(dtype), b.to(dtype)).to(a.dtype)
    measurable = a.device.type == "cpu" and a.dtype == torch.float32 and a.dim() == 2
    # A compiler would make the key a part of the graph, and compile it once for every batch size.
    if measurable and not torch.compiler.is_compiling() and a.numel() and b.numel():
        key = ("product", a.shape[0], b.shape[1], a.shape[1].bit_length())
        return fastest(key, {"blas": lambda: a @ b, "onednn": lambda: by_convolution(a, b)})
    return a @ b


@contextmanager
def forced() -> Iterator[None]:
    """Inside, all that may be rounded is: by a device without instructions too, which is slow and differs from one with
    them in the order of addition only; and where an exact way would be as fast. To see what rounding does."""
    global _forced
    before, _forced = _forced, True
    try:
        with unmeasured():
            yield
    finally:
        _forced = before


def rounds(device: torch.device, dtype: torch.dtype | None) -> bool:
    """Whether products that may be computed in a dtype are."""
    return dtype is not None and (_forced or supports(device, dtype))


def supports(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a device has instructions for products in a dtype."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return _cpu_multiplies_bfloat16
    return True


def matched(d: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """d 2^k and a 2^-k, whose largest entries are within a factor of four of each other: products d a are the same, and
    squares of the largest entries are within float32 as long as that of their product is. Nothing has to be undone."""
    if not d.numel() or not a.numel():
        return d, a
    limits = (torch.aminmax(x) for x in (d, a))
    of_d, of_a = (torch.frexp(torch.maximum(-least, most)) for least, most in limits)  # the host need not know
    k = ((of_a.exponent - of_d.exponent) // 2).clamp(-126, 126)  # of which 2^k and 2^-k are normal numbers
    one = torch.ones_like(of_d.mantissa)
    return d * torch.ldexp(one, k), a * torch.ldexp(one, -k)


def rounded(a: Tensor, b: Tensor) -> Tensor:
    if a.device.type == "cuda":
        multiply = torch.mm if a.dim() == 2 else torch.bmm
        return multiply(a, b, out_dtype=torch.float32)
    return a @ b  # added up in float32, and rounded once


def by_convolution(a: Tensor, b: Tensor) -> Tensor:
    """a @ b as a convolution with a kernel of one position, which oneDNN computes: 2x faster than MKL on AMD."""
    return torch.conv1d(b.unsqueeze(0), a.unsqueeze(2)).squeeze(0)


_cpu_multiplies_bfloat16 = any(torch.cpu.get_capabilities().get(name) for name in BFLOAT16_INSTRUCTIONS)
