"""Kernels in C++ for the CPU, for what torch can only do through memory.

`gradstats.native.enabled = False` leaves everything to torch, from the next backward pass on.
"""

from __future__ import annotations

from gradstats.native.build import library

__all__ = ["enabled", "library"]

enabled = True
