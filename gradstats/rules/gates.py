"""What one position of a recurrent layer computes between its matmuls, and the derivatives of that.

    z = W_ih x + b_ih,  u = W_hh h' + b_hh        (n, gates), h' and c' the states before the position
    h, c = step(z, u, h', c')                     (n, hidden)

Backwards, dL/du is dh and dc times factors in which the loss does not occur: they are formed for all positions at once,
and the loop back through time is a linear recurrence.

Index letters: n example, t position. Positions come first, since loops run over them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class States(NamedTuple):
    """h, and the cell state of an LSTM: (n, hidden) at one position or (t, n, hidden) at all."""

    h: Tensor
    c: Tensor | None


class Factors(NamedTuple):
    """Of all positions (t, n, ...)."""

    products: tuple[Tensor, ...]  # what `back` multiplies dh and dc by
    keep_h: Tensor | None = None  # dh'/dh beside the path through W_hh, none if None
    keep_c: Tensor | None = None  # dc'/dc


class Gates(ABC):
    """Functions without state, a class for each kind of recurrent layer."""

    @staticmethod
    def first(x: Tensor, w_hh: Tensor, h0: Tensor | None, c0: Tensor | None) -> States:
        """The states before the first position, zeros where none are given."""
        return States(x.new_zeros(x.shape[0], w_hh.shape[1]) if h0 is None else h0, None)

    @staticmethod
    @abstractmethod
    def step(z: Tensor, u: Tensor, before: States) -> tuple[States, tuple[Tensor, ...]]:
        """The states after a position, and what `factors` needs beside them."""

    @staticmethod
    @abstractmethod
    def factors(kept: Sequence[Tensor], before: States, after: States) -> Factors:
        """From what `step` kept and the states, of all positions."""

    @staticmethod
    @abstractmethod
    def back(dh: Tensor, dc: Tensor | None, products: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """d (n, ...), which begins with dL/du, and the whole of dL/dc."""

    @staticmethod
    def input_gradient(d: Tensor) -> Tensor:
        """dL/dz (t, n, gates) from d of all positions."""
        return d


class Tanh(Gates):
    """h = tanh(z + u)."""

    @staticmethod
    def step(z, u, before):
        return States(torch.tanh(z + u), None), ()

    @staticmethod
    def factors(kept, before, after):
        return Factors((1 - after.h.square(),))

    @staticmethod
    def back(dh, dc, products):
        return dh * products[0], None


class ReLU(Tanh):
    """h = max(z + u, 0)."""

    @staticmethod
    def step(z, u, before):
        return States(torch.relu(z + u), None), ()

    @staticmethod
    def factors(kept, before, after):
        return Factors(((after.h > 0).to(after.h.dtype),))


class LSTM(Gates):
    """i, f, g, o = sigmoid or (g) tanh of the chunks of z + u;  c = f c' + i g,  h = o tanh(c)."""

    @staticmethod
    def first(x, w_hh, h0, c0):
        c = x.new_zeros(x.shape[0], w_hh.shape[0] // 4) if c0 is None else c0
        return Gates.first(x, w_hh, h0, None)._replace(c=c)

    @staticmethod
    def step(z, u, before):
        i, f, g, o = torch.add(z, u).chunk(4, -1)
        i, f, g, o = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)
        c = torch.addcmul(f * before.c, i, g)
        return States(o * torch.tanh(c), c), (i, f, g, o)

    @staticmethod
    def factors(kept, before, after):
        i, f, g, o = kept
        tanh_c = torch.tanh(after.c)
        dc = torch.stack((g * i * (1 - i), before.c * f * (1 - f), i * (1 - g.square())), -2)  # (t, n, 3, hidden)
        return Factors((o * (1 - tanh_c.square()), dc, tanh_c * o * (1 - o)), keep_c=f)

    @staticmethod
    def back(dh, dc, products):
        through_c, of_c, of_h = products
        dc = torch.addcmul(dc, dh, through_c)
        return torch.cat(((dc.unsqueeze(-2) * of_c).flatten(-2), dh * of_h), -1), dc


class GRU(Gates):
    """r, w = sigmoid of the first two chunks of z + u, v = tanh(z_3 + r u_3);  h = (1 - w) v + w h'."""

    @staticmethod
    def step(z, u, before):
        (z_r, z_w, z_v), (u_r, u_w, u_v) = z.chunk(3, -1), u.chunk(3, -1)
        r, w = torch.sigmoid(z_r + u_r), torch.sigmoid(z_w + u_w)
        v = torch.tanh(torch.addcmul(z_v, r, u_v))
        return States(torch.lerp(v, before.h, w), None), (r, w, v, u_v)

    @staticmethod
    def factors(kept, before, after):
        r, w, v, u_v = kept
        of_v = (1 - w) * (1 - v.square())
        # dL/du and, fourth, dL/dz_3: r stands between the third chunks.
        products = torch.stack((of_v * u_v * r * (1 - r), (before.h - v) * w * (1 - w), of_v * r, of_v), -2)
        return Factors((products,), keep_h=w)

    @staticmethod
    def back(dh, dc, products):
        return (dh.unsqueeze(-2) * products[0]).flatten(-2), None

    @staticmethod
    def input_gradient(d):
        r, w, _, v = d.chunk(4, -1)
        return torch.cat((r, w, v), -1)


# By torch's name for the mode of a recurrent network.
GATES: dict[str, type[Gates]] = {"RNN_TANH": Tanh, "RNN_RELU": ReLU, "LSTM": LSTM, "GRU": GRU}
