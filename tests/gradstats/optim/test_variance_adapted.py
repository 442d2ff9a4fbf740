"""VarianceAdaptedSGD and VarianceAdaptedAdam: their equations, and what is left of them without noise."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gradstats import GradstatsError, LifetimeError, attach
from gradstats.optim import BatchInvariantAdam, BatchInvariantSGD, VarianceAdaptedAdam, VarianceAdaptedSGD
from tests.gradstats.optim import reference
from tests.gradstats.optim.problem import problem, train, vector
from tests.gradstats.optim.quartic import Momentum, Quartic, compare


class Gamma:
    """The docstring's first lines. `running` is m~ before this batch, for B = 1."""

    def __init__(self, r, noise_beta, batch_size):
        self.r, self.rho, self.e, self.variance = r, noise_beta ** (1 / batch_size), 0, torch.zeros(())

    def move(self, g, running):
        b = len(g)
        self.e += b
        w = (1 - self.rho**b) / (1 - self.rho**self.e)
        s2 = g.var(0) if b > 1 else g[0].square() - g[0] * running
        self.variance = (1 - w) * self.variance + w * s2

    def __call__(self, m):
        return m.square() / (m.square() + self.variance.clamp(min=0) / self.r)


class SGD:
    def __init__(self, p, lr, momentum, weight_decay, batch_size, average, r, noise_beta):
        self.p, self.lr, self.momentum, self.decay, self.b0 = p.clone(), lr, momentum, weight_decay, batch_size
        self.gamma, self.average = Gamma(r, noise_beta, batch_size), Momentum(momentum, batch_size, average)

    def step(self, g):
        b = len(g)
        self.gamma.move(g, self.average.before(b))
        m = self.average.after(b, g.mean(0))
        self.p = self.p * (1 - self.lr * self.decay) ** (b / self.b0)
        self.p = self.p - self.gamma(m) * b / self.b0 * self.lr / (1 - self.momentum) * m
        return self.p


class Adam(reference.Adam):
    def __init__(self, p, r, noise_beta, **args):
        super().__init__(p, reference=r, **args)
        self.gamma = Gamma(r, noise_beta, args["batch_size"])

    def step(self, g):
        decayed = self.p * (1 - self.lr * self.decay) ** (len(g) / self.b0)
        self.gamma.move(g, self.m)
        moved = super().step(g)
        self.p = decayed + self.gamma(self.m) * (moved - decayed)
        return self.p


MSVAG = {"momentum": 0.9, "dampening": 0.9, "average": "debiased_ewma"}


@pytest.mark.parametrize("r", [1, 8, 100])
@pytest.mark.parametrize("average", ["heavy_ball", "debiased_ewma"])
def test_sgd_follows_its_equations(r, average):
    args = {"lr": 0.002, "momentum": 0.8, "weight_decay": 0.1, "batch_size": 8, "noise_beta": 0.97, "average": average}
    compare(
        lambda ps: VarianceAdaptedSGD(ps, **args, reference_batch_size=None if r == 8 else r),
        lambda p: SGD(p, r=r, **args),
    )


@pytest.mark.parametrize("r", [1, 8, 100])
def test_adam_follows_its_equations(r):
    args = {"lr": 0.02, "betas": (0.9, 0.97), "eps": 1e-8, "weight_decay": 0.1, "batch_size": 8}
    compare(
        lambda ps: VarianceAdaptedAdam(ps, **args, reference_batch_size=r, noise_beta=0.95),
        lambda p: Adam(p, r, 0.95, **args),
    )


def test_a_variance_estimated_below_zero_is_none():
    """Single examples whose gradient shrinks: m m~ is above q."""
    args = {"lr": 0.01, "momentum": 0.8, "weight_decay": 0.0, "batch_size": 8, "noise_beta": 0.0}
    args["average"] = "debiased_ewma"
    optimizer = compare(
        lambda ps: VarianceAdaptedSGD(ps, **args), lambda p: SGD(p, r=8, **args), sizes=[1] * 9, noise=0
    )
    assert all((state["variance"] < 0).all() for state in optimizer.state.values())


def test_without_momentum_one_example_is_all_noise():
    model = Quartic()
    attach(model)
    optimizer = VarianceAdaptedSGD(model.parameters(), lr=0.1, batch_size=1, reference_batch_size=4)
    x, before = torch.ones(1, 3, dtype=torch.float64), model.p.detach().clone()
    model(x).mean().backward()
    optimizer.step()
    torch.testing.assert_close(before - model.p.detach(), 0.1 * (before - 1) ** 3 * 4 / 5)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, MSVAG, {"momentum": 0.9, "nesterov": True}])
def test_sgd_without_noise_is_sgd(options):
    results = []
    for kind in (VarianceAdaptedSGD, BatchInvariantSGD):
        model, x, y = problem()
        x, y = x[:1].expand_as(x), y[:1].expand_as(y)
        attach(model)
        optimizer = kind(model.parameters(), lr=0.1, batch_size=16, **options)
        results.append(train(model, optimizer, x, y, [16, 64, 2] * 10))
    torch.testing.assert_close(*results, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("kind", "parent"), [(VarianceAdaptedSGD, BatchInvariantSGD), (VarianceAdaptedAdam, None)])
def test_an_infinite_reference_is_the_parent(kind, parent):
    args = {"lr": 0.01, "batch_size": 16, "weight_decay": 0.1, "compiled": False}
    reference = {"reference_batch_size": float("inf")}
    results = []
    for make in (
        lambda ps: kind(ps, **args, **reference),
        lambda ps: (parent or BatchInvariantAdam)(ps, **args, **({} if parent else reference)),
    ):
        model, x, y = problem()
        attach(model)
        results.append(train(model, make(model.parameters()), x, y, [16, 1, 64] * 5))
    assert torch.equal(*results)


def test_gamma_does_not_depend_on_the_batch_size():
    """Its mean over elements, at parameters that hardly move, once the averages have seen many examples."""
    means = []
    for b in (8, 64):
        model, x, y = problem()
        attach(model)
        options = {"lr": 1e-12, "batch_size": 256, "momentum": 0.99, "average": "debiased_ewma", "noise_beta": 0.99}
        optimizer = VarianceAdaptedSGD(model.parameters(), **options)
        train(model, optimizer, x, y, [b] * (1024 // b))
        gammas = [s["exp_avg"] ** 2 / (s["exp_avg"] ** 2 + s["variance"] / 256) for s in optimizer.state.values()]
        means.append(torch.cat([gamma.flatten() for gamma in gammas]).mean())
    torch.testing.assert_close(*means, rtol=0.01, atol=0)


@pytest.mark.parametrize("options", [{}, MSVAG])
def test_max_norm_shortens_the_step_and_leaves_gamma(options):
    steps = []
    for bound in (None, 1e-6):
        model, x, y = problem()
        attach(model)
        optimizer = VarianceAdaptedSGD(model.parameters(), lr=1.0, batch_size=16, max_norm=bound, **options)
        before = vector(model)
        steps.append(train(model, optimizer, x, y, [16]) - before)
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    torch.testing.assert_close(steps[1], steps[0] * (1e-6 / norm), rtol=1e-6, atol=1e-14)


def test_refusals():
    model, x, y = problem()
    attach(model)
    F.cross_entropy(model(x), y).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    with pytest.raises(LifetimeError, match="max_norm"):
        VarianceAdaptedSGD(model.parameters()).step()
    for kind in (VarianceAdaptedSGD, VarianceAdaptedAdam):
        for name, value in (("noise_beta", 1.0), ("reference_batch_size", 0.5), ("lr", -1.0)):
            with pytest.raises(GradstatsError, match=name):
                kind(nn.Linear(2, 2).parameters(), **{name: value})
