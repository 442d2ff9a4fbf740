"""Adam with every source, estimator, average and denominator, against a twin; and the limits of the family."""

import math

import pytest
import torch

from gradstats import attach
from gradstats.optim import BatchInvariantAdam, BatchInvariantSGD
from tests.gradstats.optim.problem import problem, train
from tests.gradstats.optim.quartic import compare

TUNED = 8
INF = math.inf


class Twin:
    """moment.py's and adam.py's docstrings, for one tensor."""

    def __init__(self, p, lr, betas, eps, r, source, estimator, average, amsgrad, denominator, l2):
        self.p, self.lr, self.betas, self.eps, self.r = p.clone(), lr, betas, eps, INF if source == "mean_square" else r
        self.source, self.estimator, self.kind, self.l2 = source, estimator, average, l2
        self.amsgrad, self.denominator = amsgrad, denominator
        self.e = self.e_q = 0
        self.m = self.s = self.q = self.largest = torch.zeros_like(p)
        self.previous = None

    def rho(self, beta, n):
        return beta ** (n / TUNED)

    def weight(self, beta, b, e):
        return {
            "mean": b / e,
            "ewma": 1 - self.rho(beta, b),
            "debiased_ewma": (1 - self.rho(beta, b)) / (1 - self.rho(beta, e)),
            "slides": b / min(e, max(b, TUNED / (1 - beta))),
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

    remembers = False

    def floor(self, s):
        if self.source == "squared_batch_mean":
            return s
        if self.source == "variance":
            return s.clamp(min=0)
        if self.r == INF:
            return torch.maximum(s, self.m.square())
        if self.e_q == 0:
            return s
        return torch.maximum(s, self.q / self.r * self.mass(self.betas[1], self.e) / self.mass(self.betas[1], self.e_q))

    def step(self, g):
        g = g + self.l2 * self.p
        b, m, q = len(g), g.mean(0), g.square().mean(0)
        v = self.value(g)
        self.e += b
        if self.remembers:
            self.previous = m
        w1, w2 = (self.weight(beta, b, self.e) for beta in self.betas)
        squares = self.source in ("second_moment", "mean_square") and self.r != INF
        if squares and (self.r > b or self.e_q):
            self.e_q += b
            w3 = self.weight(self.betas[1], b, self.e_q)
            self.q = (1 - w3) * self.q + w3 * q
        self.s = (1 - w2) * self.s + w2 * v
        self.m = (1 - w1) * self.m + w1 * m
        s = self.floor(self.s)
        if self.amsgrad:
            correction = 1 - self.rho(self.betas[1], self.e) if self.kind == "debiased_ewma" else 1.0
            self.largest = torch.maximum(self.largest, s * correction)
            s = self.largest / correction
        below = 1 + s.sqrt() / self.eps if self.denominator == "slides" else s.sqrt() + self.eps
        self.p = self.p - b / TUNED * self.lr * self.m / below
        return self.p


DEFAULTS = {
    "source": "second_moment",
    "estimator": "running_average",
    "average": "debiased_ewma",
    "amsgrad": False,
    "denominator": "adam",
}


@pytest.mark.parametrize(
    ("r", "options"),
    [
        *((r, {"estimator": estimator}) for r in (1, 8, 100, INF) for estimator in ("previous", "in_batch")),
        *((r, {"average": average}) for r in (1, 100) for average in ("mean", "ewma", "slides")),
        *((r, {"source": "variance", "estimator": e}) for r in (1, 8) for e in ("running_average", "previous")),
        (8, {"source": "mean_square"}),
        (8, {"source": "mean_square", "estimator": "in_batch"}),
        (8, {"source": "squared_batch_mean"}),
        (INF, {"average": "ewma"}),
        *((r, {"amsgrad": True, "average": average}) for r in (8, 100) for average in ("debiased_ewma", "ewma")),
        (1, {"denominator": "slides"}),
    ],
)
@pytest.mark.parametrize("l2", [0.0, 0.1])
def test_adam_follows_its_equations(r, options, l2):
    chosen = DEFAULTS | options
    numbers = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 0.1 if chosen["denominator"] == "slides" else 1e-3}
    decay = {"weight_decay": l2, "decoupled_weight_decay": False}
    compare(
        lambda ps: BatchInvariantAdam(ps, **numbers, **chosen, **decay, reference_batch_size=r, batch_size=TUNED),
        lambda p: Twin(p, **numbers, **chosen, r=r, l2=l2),
    )


def test_the_slides_lr_is_that_of_sgd():
    """lr m~ / (1 + sqrt(s)/eps) for a large eps."""
    results = []
    for make in (
        lambda ps: BatchInvariantAdam(
            ps, lr=0.1, betas=(0.9, 0.99), eps=1e14, denominator="slides", batch_size=16, reference_batch_size=1
        ),
        lambda ps: BatchInvariantSGD(ps, lr=0.1, momentum=0.9, dampening=0.9, average="debiased_ewma", batch_size=16),
    ):
        model, x, y = problem()
        attach(model)
        results.append(train(model, make(model.parameters()), x, y, [16, 3, 64, 1] * 5))
    torch.testing.assert_close(*results, rtol=0, atol=1e-11)
