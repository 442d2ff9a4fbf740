"""LayerNorm and RMSNorm: the backward pass with what every example contributes to weight and bias.

    xhat = (x - mean) / sqrt(variance + eps)           RMSNorm: mean = 0, variance = mean(x^2)
    dx   = (w d - mean(w d) - xhat mean(w d xhat)) / sqrt(variance + eps)        RMSNorm: without mean(w d)
    weight_n = sum_t d_nt xhat_nt        bias_n = sum_t d_nt

in one pass over d and x (n, t, f), where torch's operations make several: a program takes some positions of one
example, a row in registers, and forms mean and variance anew. What remains, (n, f), is small: any statistic is made of
it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradstats import kernels

# Elements that a program handles at once, as several short rows or one long one.
ELEMENTS = 2048

# Programs a multiprocessor, so that some compute while others wait for memory.
PROGRAMS = 8


@triton.jit
def _backward(
    d,
    x,
    weight,
    dx,  # contiguous, or None
    weights,  # (N, parts, F)
    biases,  # the same, or None
    T,
    F,
    d_n,
    d_t,
    d_f,
    x_n,
    x_t,
    x_f,
    share,  # positions of a program
    eps,
    CENTERED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    n, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    f = tl.arange(0, BLOCK_F)
    inside = f < F
    w = tl.load(weight + f, mask=inside, other=0.0).to(tl.float32)
    of_weight = tl.zeros((BLOCK_F,), tl.float32)
    of_bias = tl.zeros((BLOCK_F,), tl.float32)
    first = part * share
    end = tl.minimum(first + share, T)
    for start in range(first, end, ROWS):
        t = start + tl.arange(0, ROWS).to(tl.int64)
        mask = (t < end)[:, None] & inside[None, :]
        row = tl.load(x + n * x_n + t[:, None] * x_t + f[None, :] * x_f, mask=mask, other=0.0).to(tl.float32)
        cotangent = tl.load(d + n * d_n + t[:, None] * d_t + f[None, :] * d_f, mask=mask, other=0.0).to(tl.float32)
        if CENTERED:
            row = tl.where(mask, row - tl.sum(row, 1, keep_dims=True) / F, 0.0)
        scale = 1 / tl.sqrt(tl.sum(row * row, 1, keep_dims=True) / F + eps)
        xhat = row * scale
        product = tl.where(mask, cotangent * xhat, 0.0)  # beyond the last position the scale may be infinite
        of_weight += tl.sum(product, 0)
        of_bias += tl.sum(cotangent, 0)
        if dx is not None:
            change = cotangent * w - xhat * (tl.sum(product * w, 1, keep_dims=True) / F)
            if CENTERED:
                change -= tl.sum(cotangent * w, 1, keep_dims=True) / F
            tl.store(dx + (n * T + t[:, None]) * F + f[None, :], change * scale, mask=mask)
    place = (n * tl.num_programs(1) + part) * F + f
    tl.store(weights + place, of_weight, mask=inside)
    if biases is not None:
        tl.store(biases + place, of_bias, mask=inside)


def backward(
    d: Tensor, x: Tensor, weight: Tensor, eps: float, centered: bool, wanted: frozenset[str]
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """dx like x, and every example's contribution to weight and bias (n, *weight.shape) in float32; None for input and
    bias where they are not wanted."""
    features, shape = weight.numel(), (x.shape[0], *weight.shape)
    d, rows = (tensor.reshape(len(x), -1, features) for tensor in (d, x))
    n, t, _ = rows.shape
    parts = min(t, triton.cdiv(PROGRAMS * kernels.multiprocessors(x.device), n))
    share = triton.cdiv(t, parts)
    block = triton.next_power_of_2(features)
    at_once = min(triton.next_power_of_2(share), max(1, ELEMENTS // block))
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if "input" in wanted else None
    weights = x.new_empty((n, parts, features), dtype=torch.float32)
    biases = torch.empty_like(weights) if "bias" in wanted else None
    with torch.cuda.device_of(x):
        _backward[(n, parts)](
            d,
            rows,
            weight.contiguous(),
            dx,
            weights,
            biases,
            t,
            features,
            *d.stride(),
            *rows.stride(),
            share,
            eps,
            CENTERED=centered,
            ROWS=at_once,
            BLOCK_F=block,
            num_warps=min(16, max(1, at_once * block // 512)),
        )
    return dx, weights.sum(1).reshape(shape), None if biases is None else biases.sum(1).reshape(shape)
