"""A recurrent layer in one direction, and the cells: positions one after the other.

    z_t = W_ih x_t + b_ih,   u_t = W_hh h_(t-1) + b_hh,   h_t, c_t = step(z_t, u_t, h_(t-1), c_(t-1))

With dz_t = dL/dz_t and du_t = dL/du_t, summed over the positions of an example before squaring:

    W_ih: c_b = sum_t dz_bt x_bt^T          b_ih: c_b = sum_t dz_bt
    W_hh: c_b = sum_t du_bt h_b(t-1)^T      b_hh: c_b = sum_t du_bt

An LSTM with projection has h_t = W_hr m_t, and c_b = sum_t dh_bt m_bt^T for W_hr.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradstats.contribution import Contribution
from gradstats.forms.dense import Dense, PositionSum
from gradstats.forms.outer import OuterSum
from gradstats.rules.gates import GATES, Factors, Gates, States
from gradstats.rules.linear import outer
from gradstats.rules.registry import Rule, rule


class Unroll(NamedTuple):
    """How a layer runs through its positions."""

    gates: type[Gates]
    reverse: bool = False
    inside: Tensor | None = None  # (t, n, 1), False after the end of a shorter sequence; None if all are as long

    def order(self, positions: int) -> list[int]:
        return list(range(positions))[:: -1 if self.reverse else 1]

    def stack(self, found: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
        """Tensors found in that order, by position (t, n, ...)."""
        return torch.stack(found[:: -1 if self.reverse else 1])

    def before(self, states: Tensor, first: Tensor) -> Tensor:
        """The states before every position (t, n, hidden), from those after it."""
        first = first.unsqueeze(0)
        return torch.cat((states[1:], first) if self.reverse else (first, states[:-1]))

    def held(self, t: int, new: States, old: States) -> States:
        """Examples whose sequence has ended, or in reverse not begun, keep their states."""
        if self.inside is None:
            return new
        inside = self.inside[t]
        c = None if new.c is None or old.c is None else torch.where(inside, new.c, old.c)
        return States(torch.where(inside, new.h, old.h), c)

    def held_factors(self, factors: Factors) -> Factors:
        """The derivatives of `held`."""
        if self.inside is None:
            return factors
        products, keep_h, keep_c = factors
        inside = self.inside.to(products[0].dtype)
        return Factors(
            tuple(p * inside.view(*inside.shape[:2], *[1] * (p.dim() - 2)) for p in products),
            1 - inside if keep_h is None else torch.where(self.inside, keep_h, 1.0),
            None if keep_c is None else torch.where(self.inside, keep_c, 1.0),
        )

    def weight(self, d: Tensor, a: Tensor) -> Contribution:
        """sum_t d_bt a_bt^T, from d and a by position."""
        d, a = d.transpose(0, 1), a.transpose(0, 1)
        return outer(d, a) if self.inside is None else Uneven(d, a)

    def bias(self, d: Tensor) -> Contribution:
        """sum_t d_bt."""
        d = d.transpose(0, 1)
        return PositionSum(d, 1) if self.inside is None else Dense(d.sum(1))


class Uneven(OuterSum):
    """Over sequences of unequal length: the positions after an end are nobody's."""

    per_token = Contribution.per_token


class Direction(Rule):
    """One layer of a recurrent network in one direction.

    x (n, t, i), h0 and c0 (n, hidden), None for zeros -> h_t at all positions (n, t, hidden) and, of an LSTM, the last
    c (n, hidden).
    """

    parameters: ClassVar[tuple[str, ...]] = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
    inputs = ("input", "h0", "c0")
    autocast = "low"

    @staticmethod
    def forward(options, x, parameters):
        unroll: Unroll = options
        x, h0, c0 = x
        w_ih, w_hh, b_ih, b_hh, w_hr = (parameters.get(name) for name in Direction.parameters)
        first = state = unroll.gates.first(x, w_hh, h0, c0)
        z = F.linear(x.transpose(0, 1), w_ih, b_ih)  # (t, n, gates)
        states, m, kept = [], [], []
        for t in unroll.order(len(z)):
            new, of_step = unroll.gates.step(z[t], F.linear(state.h, w_hh, b_hh), state)
            if w_hr is not None:
                m.append(new.h)
                new = new._replace(h=F.linear(new.h, w_hr))
            state = unroll.held(t, new, state)
            states.append(state)
            kept.append(of_step)
        h, c = (None if of[0] is None else unroll.stack(of) for of in zip(*states, strict=True))  # (t, n, hidden)
        saved = x, w_ih, w_hh, w_hr, *first, h, c, unroll.stack(m) if m else None
        y = h.transpose(0, 1)
        return y if c is None else (y, state.c), (*saved, *map(unroll.stack, zip(*kept, strict=True)))

    @staticmethod
    def backward(options, saved, d, wanted):
        unroll: Unroll = options
        x, w_ih, w_hh, w_hr, h0, c0, h, c, m, *kept = saved
        dy, dc = (d, None) if c is None else d
        before = States(unroll.before(h, h0), None if c is None else unroll.before(c, c0))
        products, keep_h, keep_c = unroll.held_factors(unroll.gates.factors(kept, before, States(h, c)))
        dh, dhs, found = torch.zeros_like(h0), [], []
        for t in reversed(unroll.order(len(h))):
            dh = dh + dy[:, t]
            dhs.append(dh)
            of_step, dc = unroll.gates.back(dh if w_hr is None else dh @ w_hr, dc, [p[t] for p in products])
            found.append(of_step)
            through = of_step[:, : len(w_hh)] @ w_hh
            dh = through if keep_h is None else torch.addcmul(through, dh, keep_h[t])
            dc = None if keep_c is None else dc * keep_c[t]
        every = unroll.stack(found[::-1])  # (t, n, ...)
        du, dz = every[..., : len(w_hh)], unroll.gates.input_gradient(every)
        contributions: dict[str, Contribution] = {}
        if "weight_ih" in wanted:
            contributions["weight_ih"] = unroll.weight(dz, x.transpose(0, 1))
        if "weight_hh" in wanted:
            contributions["weight_hh"] = unroll.weight(du, before.h)
        if "bias_ih" in wanted:
            contributions["bias_ih"] = unroll.bias(dz)
        if "bias_hh" in wanted:
            contributions["bias_hh"] = unroll.bias(du)
        if "weight_hr" in wanted:
            dh_t = unroll.stack(dhs[::-1])
            contributions["weight_hr"] = unroll.weight(dh_t if unroll.inside is None else dh_t * unroll.inside, m)
        gradients = (dz @ w_ih).transpose(0, 1) if "input" in wanted else None, dh, dc
        named = zip(Direction.inputs, gradients, strict=True)
        return tuple(gradient if name in wanted else None for name, gradient in named), contributions


@rule(nn.RNNCell, nn.LSTMCell, nn.GRUCell)
class Cell(Direction):
    """One position: x (n, i), h0 and c0 -> h (n, hidden) and, of an LSTM, c."""

    parameters = Direction.parameters[:4]

    @staticmethod
    def bind(module, input, hx=None):
        h, c = hx if isinstance(module, nn.LSTMCell) and hx is not None else (hx, None)
        return input, h, c

    @staticmethod
    def unbatched(module, x):
        return x[0].dim() < 2

    @staticmethod
    def options(module):
        if isinstance(module, nn.RNNCell):
            return Unroll(GATES[f"RNN_{module.nonlinearity.upper()}"])
        return Unroll(GATES["LSTM" if isinstance(module, nn.LSTMCell) else "GRU"])

    @staticmethod
    def forward(options, x, parameters):
        x, h0, c0 = x
        y, saved = Direction.forward(options, (x.unsqueeze(1), h0, c0), parameters)
        h, *c = y if isinstance(y, tuple) else (y,)
        h = h.squeeze(1).clone()  # what is saved must survive an operation in place
        return (h, *c) if c else h, saved

    @staticmethod
    def backward(options, saved, d, wanted):
        d = (d[0].unsqueeze(1), d[1]) if isinstance(d, tuple) else d.unsqueeze(1)
        (dx, dh, dc), contributions = Direction.backward(options, saved, d, wanted)
        return (None if dx is None else dx.squeeze(1), dh, dc), contributions
