"""QuenchingSGD: its equations, SGD where there is no noise, rest where there is nothing else."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gradstats import GradstatsError, LifetimeError, attach
from gradstats.optim import QuenchingSGD
from tests.gradstats.optim.problem import problem, train, vector
from tests.gradstats.optim.quartic import compare


class Twin:
    """The docstring, line by line."""

    def __init__(self, p, lr, weight_decay, batch_size, noise_beta):
        self.p, self.lr, self.decay, self.b0 = p.clone(), lr, weight_decay, batch_size
        self.rho, self.e, self.m, self.mu2, self.s2 = noise_beta ** (1 / batch_size), 0, 0 * p, 0 * p, 0 * p

    def step(self, g):
        b, m = len(g), g.mean(0)
        self.e += b
        s2 = g.var(0) if b > 1 else m.square() - m * self.m
        mu2 = m.square() - s2 / b if b > 1 else m * self.m
        w = (1 - self.rho**b) / (1 - self.rho**self.e)
        self.s2, self.mu2 = (1 - w) * self.s2 + w * s2, (1 - w) * self.mu2 + w * mu2
        n = torch.where(self.mu2 > 0, self.s2.clamp(min=0) / self.mu2, torch.inf).clamp(min=self.b0)
        w = b / n.clamp(min=b, max=self.e)
        self.m = (1 - w) * self.m + w * m
        self.p = self.p * (1 - self.lr * self.decay) ** (b / self.b0) - b / n * self.lr * self.m
        return self.p


def test_follows_its_equations():
    args = {"lr": 0.05, "weight_decay": 0.1, "batch_size": 8, "noise_beta": 0.9}
    compare(lambda ps: QuenchingSGD(ps, **args), lambda p: Twin(p, **args))


def test_without_noise_is_sgd_at_the_tuned_batch_size():
    results = []
    for kind in (QuenchingSGD, torch.optim.SGD):
        model, x, y = problem()
        x, y = x[:1].expand_as(x), y[:1].expand_as(y)
        attach(model)
        options = {"batch_size": 16} if kind is QuenchingSGD else {}
        results.append(train(model, kind(model.parameters(), lr=0.1, **options), x, y, [16] * 30))
    torch.testing.assert_close(*results, rtol=0, atol=1e-10)


def test_noise_alone_moves_it_less_than_sgd():
    """A gradient whose mean is zero: in 200 batches SGD walks about, and what is quenched a quarter as far."""
    distances = []
    for kind in (QuenchingSGD, torch.optim.SGD):
        torch.manual_seed(0)
        model = nn.Linear(100, 1, bias=False).double()
        attach(model)
        optimizer = kind(model.parameters(), lr=0.1, **({"batch_size": 16} if kind is QuenchingSGD else {}))
        before = model.weight.detach().clone()
        for _ in range(200):
            optimizer.zero_grad()
            model(torch.randn(16, 100, dtype=torch.float64)).mean().backward()
            optimizer.step()
        distances.append((model.weight.detach() - before).norm())
    assert distances[0] < 0.25 * distances[1]


def test_max_norm_bounds_the_running_average():
    model, x, y = problem()
    x, y = x[:1].expand_as(x), y[:1].expand_as(y)
    attach(model)
    optimizer = QuenchingSGD(model.parameters(), lr=1.0, batch_size=16, max_norm=1e-3)
    before = vector(model)
    torch.testing.assert_close(
        (train(model, optimizer, x, y, [16]) - before).norm(), torch.tensor(1e-3, dtype=torch.float64)
    )


def test_maximize_ascends():
    results = []
    for maximize, sign in ((True, -1), (False, 1)):
        model, x, y = problem()
        attach(model)
        optimizer = QuenchingSGD(model.parameters(), lr=0.1, batch_size=16, maximize=maximize)
        results.append(train(model, optimizer, x, y, [16, 4, 1, 1], sign=sign))
    assert torch.equal(*results)


def test_refusals():
    model, x, y = problem()
    attach(model)
    F.cross_entropy(model(x), y).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    with pytest.raises(LifetimeError, match="max_norm"):
        QuenchingSGD(model.parameters()).step()
    for name, value in (("noise_beta", 1.0), ("lr", -1.0), ("max_norm", 0.0)):
        with pytest.raises(GradstatsError, match=name):
            QuenchingSGD(nn.Linear(2, 2).parameters(), **{name: value})
