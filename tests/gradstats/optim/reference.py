"""The plain twin of BatchInvariantAdam: one parameter tensor, a loop over the equations, gradients handed in."""

from __future__ import annotations

import math

import torch


class Adam:
    """The docstrings of adam.py and moment.py, line by line."""

    remembers = False

    def __init__(
        self,
        p,
        lr,
        betas,
        eps,
        weight_decay,
        batch_size,
        reference,
        source="second_moment",
        estimator="previous",
        average="debiased_ewma",
        amsgrad=False,
        denominator="adam",
        l2=0.0,
    ):
        self.p, self.lr, self.betas, self.eps, self.decay, self.b0 = p.clone(), lr, betas, eps, weight_decay, batch_size
        self.r = math.inf if source == "mean_square" else reference
        self.source, self.estimator, self.kind, self.l2 = source, estimator, average, l2
        self.amsgrad, self.denominator, self.missed = amsgrad, denominator, False
        self.e = self.e_q = 0
        self.waiting = 0  # examples since s moved
        self.m = self.s = self.q = self.largest = torch.zeros_like(p)
        self.previous = None

    def rho(self, beta, n):
        return beta ** (n / self.b0)

    def weight(self, beta, b, e):
        return {
            "mean": b / e,
            "ewma": 1 - self.rho(beta, b),
            "debiased_ewma": (1 - self.rho(beta, b)) / (1 - self.rho(beta, e)),
            "slides": b / min(e, max(b, self.b0 / (1 - beta))),
        }[self.kind]

    def mass(self, beta, e):
        return 1 - self.rho(beta, e) if self.kind == "ewma" else 1.0

    def value(self, g):
        b, m, q, r = len(g), g.mean(0), g.square().mean(0), self.r
        if self.source == "squared_batch_mean":
            return m.square()
        variance = self.source == "variance"
        across = b == 1 if variance or self.estimator == "in_batch" else r > b
        if across and (variance or r != 1):
            if self.estimator == "previous":
                partner = m if self.previous is None else self.previous
            else:
                partner = m if self.e == 0 else self.m / self.mass(self.betas[0], self.e)
            self.remembers = self.estimator == "previous"
            return (q - m * partner) / r if variance else q / r + (1 - 1 / r) * m * partner
        if variance:
            return g.var(0) / r
        return q if b == 1 else m.square() + (1 / r - 1 / b) * g.var(0)

    def alone(self, b):
        """v_B = m^2, for which there is nothing to gather; R = inf needs nothing either, but in one batch."""
        if self.source == "squared_batch_mean":
            return True
        if self.r == math.inf:
            return self.estimator != "in_batch"
        return self.r == b > 1 and self.source == "second_moment" and self.e_q == 0

    def floor(self, s):
        if self.source == "squared_batch_mean":
            return s
        if self.source == "variance":
            return s.clamp(min=0)
        if self.r == math.inf:
            return torch.maximum(s, self.m.square())
        if self.e_q == 0:
            return s
        covered = self.e - self.waiting
        return torch.maximum(
            s, self.q / self.r * self.mass(self.betas[1], covered) / self.mass(self.betas[1], self.e_q)
        )

    def step(self, g, gathered=True):
        """g (B, *shape): per-example gradients, whose squares are known if they were gathered."""
        g = g + self.l2 * self.p
        b, m, q = len(g), g.mean(0), g.square().mean(0)
        moves = gathered or self.alone(b)
        self.missed |= not moves
        v = self.value(g)
        self.e += b
        self.waiting += b
        if self.remembers:
            self.previous = m
        w1 = self.weight(self.betas[0], b, self.e)
        squares = self.source in ("second_moment", "mean_square") and self.r != math.inf
        if moves:
            new, self.waiting = self.waiting, 0
            if squares and (self.r > b or self.e_q):
                self.e_q += new
                w3 = self.weight(self.betas[1], new, self.e_q)
                self.q = (1 - w3) * self.q + w3 * q
            w2 = self.weight(self.betas[1], new, self.e)
            self.s = (1 - w2) * self.s + w2 * v
        self.m = (1 - w1) * self.m + w1 * m
        s = self.floor(self.s)
        if self.amsgrad:
            covered = self.e - self.waiting
            correction = 1 - self.rho(self.betas[1], covered) if self.kind == "debiased_ewma" else 1.0
            if moves:
                self.largest = torch.maximum(self.largest, s * correction)
            s = self.largest / correction
        if self.missed:  # no element moves by more than lr
            s = torch.maximum(s, self.m.square())
        below = 1 + s.sqrt() / self.eps if self.denominator == "slides" else s.sqrt() + self.eps
        self.p = self.p * (1 - self.lr * self.decay) ** (b / self.b0)
        self.p = self.p - b / self.b0 * self.lr * self.m / below
        return self.p
