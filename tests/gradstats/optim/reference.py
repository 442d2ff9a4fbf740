"""Plain twins of the optimizers: one parameter tensor, a loop over the equations, statistics handed in."""

from __future__ import annotations

import torch


class Adam:
    """BatchInvariantAdam's docstring, line by line."""

    def __init__(self, p, lr, betas, eps, weight_decay, batch_size, reference, slides=False):
        self.p, self.lr, self.eps, self.decay, self.b0, self.r = p.clone(), lr, eps, weight_decay, batch_size, reference
        self.betas, self.slides = betas, slides
        self.e = self.e_q = 0
        self.m = self.s = self.q = torch.zeros_like(p)

    def weight(self, beta, b, e):
        if self.slides:
            return b / min(e, max(b, self.b0 / (1 - beta)))
        rho = beta ** (1 / self.b0)
        return (1 - rho**b) / (1 - rho**e)

    def step(self, g):
        """g (B, *shape): per-example gradients."""
        b = len(g)
        self.e += b
        m, q = g.mean(0), g.square().mean(0)
        w1, w2 = (self.weight(beta, b, self.e) for beta in self.betas)
        if self.r > b:
            before = self.m if self.e > b else m
            v = q / self.r + (1 - 1 / self.r) * m * before
        elif b == 1:
            v = q
        else:
            v = m.square() + (1 / self.r - 1 / b) * g.var(0)
        if self.r > b or self.e_q:
            self.e_q += b
            w3 = self.weight(self.betas[1], b, self.e_q)
            self.q = (1 - w3) * self.q + w3 * q
        self.s = (1 - w2) * self.s + w2 * v
        self.m = (1 - w1) * self.m + w1 * m
        s = torch.maximum(self.s, self.q / self.r) if self.e_q else self.s
        self.p = self.p * (1 - self.lr * self.decay) ** (b / self.b0)
        self.p = self.p - b / self.b0 * self.lr * self.m / (s.sqrt() + self.eps)
        return self.p
