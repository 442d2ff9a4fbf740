"""AdaScale: torch's SGD at the tuned batch size, its equations elsewhere, and the limits of the gain."""

import copy

import pytest
import torch

from gradstats import attach
from gradstats.optim import AdaScale
from tests.gradstats.optim.problem import problem, train, vector
from tests.gradstats.optim.quartic import Quartic, compare

D = torch.float64


class Twin:
    """AdaScale's docstring, line by line, for one parameter."""

    def __init__(self, p, lr, momentum, weight_decay, batch_size):
        self.p, self.lr, self.momentum, self.decay, self.b0 = p.clone(), lr, momentum, weight_decay, batch_size
        self.v, self.mu2, self.sigma2, self.e, self.tau = torch.zeros_like(p), 0.0, 0.0, 0, 0.0

    def step(self, g):
        """g (B, *shape): per-example gradients."""
        b = len(g)
        scale = b / self.b0
        if b > 1:
            self.e += b
            w = b / min(self.e, 1000 * self.b0)
            trace = g.var(0).sum()
            self.mu2 = (1 - w) * self.mu2 + w * (g.mean(0).square().sum() - trace / b)
            self.sigma2 = (1 - w) * self.sigma2 + w * trace / self.b0
        r = scale
        if self.mu2 > 0:
            r = (self.sigma2 + self.mu2) / (self.sigma2 / scale + self.mu2)
        self.tau += r
        self.v = self.momentum * self.v + g.mean(0)
        self.p = self.p * (1 - self.lr * self.decay) ** r - r * self.lr * self.v
        return self.p


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("maximize", [False, True])
def test_is_torchs_at_the_tuned_batch_size(momentum, weight_decay, maximize):
    model, x, y = problem()
    theirs = copy.deepcopy(model)
    attach(model)
    # An ascent gets ever steeper, and rounding grows with it.
    args = {"lr": 1e-3 if maximize else 0.05, "momentum": momentum, "weight_decay": weight_decay, "maximize": maximize}
    ours = AdaScale(model.parameters(), batch_size=16, decoupled_weight_decay=False, **args)
    a = train(model, ours, x, y, [16] * 100)
    b = train(theirs, torch.optim.SGD(theirs.parameters(), **args), x, y, [16] * 100)
    assert (a - b).abs().max() <= 1e-10
    assert ours.iterations == 100


@pytest.mark.parametrize("sizes", [[64] * 20, [1, 1, 4, 64, 1, 2, 8] * 5])
@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_follows_its_equations(sizes, momentum):
    args = {"lr": 1e-3, "momentum": momentum, "weight_decay": 0.1, "batch_size": 8}
    twins = []

    def twin(p):
        twins.append(Twin(p, **args))
        return twins[0]

    optimizer = compare(lambda ps: AdaScale(ps, **args), twin, sizes=sizes)
    assert optimizer.iterations == pytest.approx(float(twins[0].tau), rel=1e-10)


def test_averages_forget_after_a_thousand_tuned_batches():
    torch.manual_seed(2)
    model = Quartic()
    attach(model)
    args = {"lr": 0.0, "momentum": 0.0, "weight_decay": 0.0, "batch_size": 1}
    optimizer, twin = AdaScale(model.parameters(), **args), Twin(model.p.detach(), **args)
    for scale in (10, 1, 1, 1):
        x = torch.randn(500, 3, dtype=D) * scale
        twin.step((model.p.detach() - x) ** 3)
        optimizer.zero_grad()
        model(x).mean().backward()
        optimizer.step()
    assert optimizer.iterations == pytest.approx(float(twin.tau), rel=1e-10)


@pytest.mark.parametrize("noise", [0.0, 1e6])
def test_the_gain_lies_between_one_and_the_scale(noise):
    """Equal examples gain nothing from being more; pure noise gains as much as there are more."""
    torch.manual_seed(2)
    model = Quartic()
    attach(model)
    optimizer = AdaScale(model.parameters(), lr=0.0, batch_size=8)
    half = noise * torch.randn(32, 3, dtype=D)
    centre = model.p.detach()
    model((torch.cat([half, -half]) + centre) if noise else torch.zeros(64, 3, dtype=D)).mean().backward()
    optimizer.step()
    assert optimizer.iterations == pytest.approx(64 / 8 if noise else 1.0, rel=1e-9)


def test_groups_share_one_gain():
    results = []
    for split in (False, True):
        model, x, y = problem()
        attach(model)
        parameters = [*model.parameters()]
        groups = [{"params": parameters[:2]}, {"params": parameters[2:]}] if split else parameters
        optimizer = AdaScale(groups, lr=0.05, momentum=0.5, batch_size=4)
        results.append((train(model, optimizer, x, y, [16, 8, 2, 1]), optimizer.iterations))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-10, atol=0)
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-12)


def test_a_group_added_later_knows_what_the_others_know():
    model, x, y = problem()
    attach(model)
    optimizer = AdaScale(model[0].parameters(), lr=0.05, batch_size=4)
    train(model, optimizer, x, y, [16, 16])
    optimizer.add_param_group({"params": model[3].parameters()})
    first, second = optimizer.param_groups
    assert second["iterations"] == first["iterations"] > 2 and second["trace"] == first["trace"] > 0


def test_decay_belongs_to_an_iteration():
    model, x, y = problem()
    attach(model)
    optimizer = AdaScale(model.parameters(), lr=0.1, weight_decay=0.5, batch_size=4)
    before = vector(model)
    train(model, optimizer, x, y, [16])
    moved = torch.cat([p.grad.flatten() for p in model.parameters()]) * 0.1 * optimizer.iterations
    torch.testing.assert_close(vector(model), before * (1 - 0.05) ** optimizer.iterations - moved)
    assert 1 < optimizer.iterations < 4


def test_max_norm_bounds_the_average_of_steps():
    model, x, y = problem()
    attach(model)
    optimizer = AdaScale(model.parameters(), lr=1.0, momentum=0.5, batch_size=16, max_norm=1e-3)
    before = vector(model)
    after = train(model, optimizer, x, y, [16])
    torch.testing.assert_close((after - before).norm(), torch.tensor(2e-3, dtype=D))
