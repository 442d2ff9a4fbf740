"""Contributions to the weight of a Bilinear layer."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from gradstats.contribution import Contribution
from gradstats.forms.streamed import Streamed
from gradstats.sums import Reduction, wide


class Products(Streamed):
    """c_b = sum_t d_bto x_bti z_btj, a Linear's on the products of its inputs: d (n, t, o), x (n, t, i), z (n, t, j).

    With one position, sum_b c_b^2 is the same sum over squares, and ||c_b||^2 = ||d_b||^2 ||x_b||^2 ||z_b||^2.
    """

    def __init__(self, d: Tensor, x: Tensor, z: Tensor):
        self.d, self.x, self.z = d, x, z
        self.count, self.dtype, self.device = d.shape[0], d.dtype, d.device
        self.shape = (d.shape[2], x.shape[2], z.shape[2])

    def gradient(self) -> Tensor:
        return torch.einsum("nto,nti,ntj->oij", self.d, self.x, self.z)

    @property
    def operands(self) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return (self.d, self.x, self.z), ()

    def example(self, n: int) -> Tensor:
        return torch.einsum("to,ti,tj->oij", self.d[n], self.x[n], self.z[n])

    def tile(self, rows: slice, columns: slice) -> Tensor:
        pairs = torch.arange(columns.start, columns.stop, device=self.device)
        products = self.x[..., pairs // self.shape[2]] * self.z[..., pairs % self.shape[2]]  # (n, t, k)
        return self.d[..., rows].mT @ products

    def direct(self, names: Collection[str]) -> Reduction:
        if self.d.shape[1] > 1:
            return super().direct(names)
        squares = Products(*(wide(factor).square() for factor in (self.d, self.x, self.z)))
        found = {}
        if "sum_of_squares" in names:
            found["sum_of_squares"] = squares.gradient()
        if "squared_norms" in names:
            found["squared_norms"] = squares.d.sum((1, 2)) * squares.x.sum((1, 2)) * squares.z.sum((1, 2))
        return self.gradient(), found

    def per_token(self) -> Contribution:
        return Products(*(factor.flatten(0, 1).unsqueeze(1) for factor in (self.d, self.x, self.z)))

    def subset(self, index: Tensor) -> Contribution:
        return Products(self.d[index], self.x[index], self.z[index])

    def merged(self, size: int) -> Contribution:
        return Products(*(f.reshape(-1, size * f.shape[1], f.shape[2]) for f in (self.d, self.x, self.z)))
