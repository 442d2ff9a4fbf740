"""Triton kernels: what torch's own operations would do in several passes over memory, in one.

    linear          positions of a Linear: gradient, sum of squares and norms, a tile of the weight in registers
    normalization   LayerNorm and RMSNorm: gradient of the input, and every example's of weight and bias
    rows            embeddings: rows that an example looks up several times, summed before squaring
    adam            a step of Adam over all parameters, in one launch

Each is imported, and Triton with it, where its operands lie on a device that Triton compiles for; what it computes is
computed otherwise too, in plain torch, and the kernel is an optimisation that no result depends on.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from gradstats.sums import addressable

DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32})

# The first that multiplies bfloat16: what is older computes in plain torch.
CAPABILITY = (8, 0)

# Features of the longest row of a normalisation layer that a program keeps in registers.
LONGEST_ROW = 8192


def available(*tensors: Tensor) -> bool:
    """Whether kernels serve tensors like these: of one device and dtype, with something in them.

    Not while torch.compile traces, whose compiler makes kernels of its own.
    """
    if torch.compiler.is_compiling() or not tensors[0].is_cuda:
        return False
    device, dtype = tensors[0].device, tensors[0].dtype
    alike = all(t.device == device and t.dtype == dtype and t.numel() for t in tensors)
    return alike and addressable(*tensors) and dtype in DTYPES and compiles(device)


@functools.cache
def compiles(device: torch.device) -> bool:
    """Whether Triton is installed, and compiles for a device."""
    return importlib.util.find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= CAPABILITY


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a device: programs beyond as many as these hold wait for their turn."""
    return torch.cuda.get_device_properties(device).multi_processor_count
