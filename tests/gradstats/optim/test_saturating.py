"""SaturatingSGD and SaturatingAdam: the noise scale that they measure, the factor, and the limits of k."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gradstats import GradstatsError, attach
from gradstats.optim import BatchInvariantAdam, BatchInvariantSGD, SaturatingAdam, SaturatingSGD
from gradstats.optim.saturating import EXTENTS
from tests import oracle
from tests.gradstats.optim import reference
from tests.gradstats.optim.problem import problem, train, vector
from tests.gradstats.optim.quartic import Momentum, Quartic, compare

D = torch.float64
TOTALS = {"model": lambda t: t.sum(), "layer": lambda t: t.sum(), "coordinate": lambda t: t}


class Factor:
    """The docstring's lines for one parameter, which is the model: 1 / (1 + B/(k B_noise))."""

    def __init__(self, k, over, noise_beta, batch_size):
        self.k, self.total, self.rho = k, TOTALS[over], noise_beta ** (1 / batch_size)
        self.e, self.signal, self.trace = 0, torch.zeros(()), torch.zeros(())

    def __call__(self, g, running):
        b, m, q = len(g), g.mean(0), g.square().mean(0)
        self.e += b
        w = (1 - self.rho**b) / (1 - self.rho**self.e)
        mu2 = self.total(m.square() - g.var(0) / b if b > 1 else m * running)
        trace = self.total(q) - mu2 if b == 1 else self.total(g.var(0))
        self.signal, self.trace = (1 - w) * self.signal + w * mu2, (1 - w) * self.trace + w * trace
        return 1 / (1 + b / self.k * self.signal.clamp(min=0) / self.trace.clamp(min=0))


class SGD:
    """With coupled decay."""

    def __init__(self, p, lr, momentum, weight_decay, batch_size, average, factor):
        self.p, self.lr, self.momentum, self.l2, self.b0 = p.clone(), lr, momentum, weight_decay, batch_size
        self.factor, self.average = factor, Momentum(momentum, batch_size, average)

    def step(self, g):
        b, g = len(g), g + self.l2 * self.p
        factor = self.factor(g, self.average.before(b))
        m = self.average.after(b, g.mean(0))
        self.p = self.p - factor * b / self.b0 * self.lr / (1 - self.momentum) * m
        return self.p


class Adam(reference.Adam):
    def __init__(self, p, factor, **args):
        super().__init__(p, reference=args["batch_size"], **args)
        self.factor = factor

    def step(self, g):
        decayed = self.p * (1 - self.lr * self.decay) ** (len(g) / self.b0)
        factor = self.factor(g, self.m)
        moved = super().step(g)
        self.p = decayed + factor * (moved - decayed)
        return self.p


@pytest.mark.parametrize("over", EXTENTS)
@pytest.mark.parametrize("average", ["heavy_ball", "debiased_ewma"])
def test_sgd_follows_its_equations(over, average):
    args = {"lr": 0.002, "momentum": 0.8, "weight_decay": 0.1, "batch_size": 8, "average": average}
    options = {"decoupled_weight_decay": False, "noise_beta": 0.9, "saturation": 2.0, "over": over}
    compare(lambda ps: SaturatingSGD(ps, **args, **options), lambda p: SGD(p, **args, factor=Factor(2, over, 0.9, 8)))


@pytest.mark.parametrize("over", EXTENTS)
def test_adam_follows_its_equations(over):
    args = {"lr": 0.02, "betas": (0.9, 0.97), "eps": 1e-8, "weight_decay": 0.1, "batch_size": 8}
    compare(
        lambda ps: SaturatingAdam(ps, **args, saturation=0.5, over=over, noise_beta=0.9),
        lambda p: Adam(p, Factor(0.5, over, 0.9, 8), **args),
    )


@pytest.mark.parametrize("over", EXTENTS)
def test_a_trace_estimated_below_zero_is_none(over):
    """Single examples whose gradient shrinks: m m~ is above q, and all of it is signal."""
    args = {"lr": 0.01, "momentum": 0.8, "weight_decay": 0.0, "batch_size": 8, "average": "debiased_ewma"}
    optimizer = compare(
        lambda ps: SaturatingSGD(ps, **args, noise_beta=0.0, over=over),
        lambda p: SGD(p, **args, factor=Factor(1, over, 0.0, 8)),
        sizes=[1] * 3,
        noise=0,
    )
    assert all((state["variance" if over == "coordinate" else "trace"] < 0).all() for state in optimizer.state.values())


def change(over, groups=lambda model: model.parameters(), b=8):
    """The first change of every parameter, that of the parent, and the per-example gradients behind them."""
    model, x, y = problem()
    y[:] = 0  # for a gradient that stands out of the noise
    parents = copy.deepcopy(model)
    c = oracle.contributions(model, F.cross_entropy, x[:b], y[:b])
    changes = []
    for one, optimizer in (
        (model, SaturatingSGD(groups(model), lr=0.1, batch_size=16, over=over)),
        (parents, BatchInvariantSGD(parents.parameters(), lr=0.1, batch_size=16)),
    ):
        attach(one)
        before = {name: p.detach().clone() for name, p in one.named_parameters()}
        train(one, optimizer, x, y, [b])
        changes.append({name: p.detach() - before[name] for name, p in one.named_parameters()})
    return changes[0], changes[1], {name: b * value for name, value in c.items()}


def factor(gs):
    """k = 1, one batch."""
    g = torch.cat([g.flatten(1) for g in gs], 1)
    trace = g.var(0).sum()
    signal = (g.mean(0).square().sum() - trace / len(g)).clamp(min=0)
    return 1 / (1 + len(g) * signal / trace)


@pytest.mark.parametrize("split", [False, True])
def test_the_models_noise_scale_is_that_of_all_parameters(split):
    """Of both groups too, whose parameters are stepped apart."""

    def groups(model):
        layers = [{"params": model[0].parameters()}, {"params": [*model[2].parameters(), *model[3].parameters()]}]
        return [layers[0], layers[1] | {"lr": 0.1, "max_norm": 1e9}] if split else model.parameters()

    ours, parents, g = change("model", groups)
    expected = factor(g.values())
    assert 0.1 < expected < 0.9
    for name in ours:
        torch.testing.assert_close(ours[name], expected * parents[name], rtol=1e-9, atol=1e-14)


def test_each_layer_has_its_own():
    ours, parents, g = change("layer")
    factors = {name: factor([value]) for name, value in g.items()}
    assert max(factors.values()) > 1.5 * min(factors.values())
    for name in ours:
        torch.testing.assert_close(ours[name], factors[name] * parents[name], rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("over", EXTENTS)
@pytest.mark.parametrize(("kind", "parent"), [(SaturatingSGD, BatchInvariantSGD), (SaturatingAdam, BatchInvariantAdam)])
def test_infinite_saturation_is_the_parent(kind, parent, over):
    results = []
    for make in (kind, parent):
        model, x, y = problem()
        attach(model)
        options = {"saturation": float("inf"), "over": over} if make is kind else {}
        optimizer = make(model.parameters(), lr=0.02, weight_decay=0.1, batch_size=16, compiled=False, **options)
        results.append(train(model, optimizer, x, y, [16, 4, 1, 64] * 2))
    assert torch.equal(*results)


@pytest.mark.parametrize("over", EXTENTS)
def test_a_step_grows_no_longer_than_the_noise_scale_allows(over):
    """Of equal statistics, a batch twice as large takes as long a step, far above the noise scale."""
    lengths = []
    for b in (4096, 8192):
        torch.manual_seed(0)
        model = Quartic()
        attach(model)
        before = model.p.detach().clone()
        optimizer = SaturatingSGD(model.parameters(), lr=0.1, batch_size=16, saturation=0.1, over=over)
        model(torch.randn(4096, 3, dtype=D).repeat(b // 4096, 1)).mean().backward()
        optimizer.step()
        lengths.append((model.p.detach() - before).norm())
    assert lengths[1] / lengths[0] == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("over", EXTENTS)
def test_a_sum_or_the_negative_of_the_loss_is_the_same(over):
    results = []
    for reduction, maximize in (("mean", False), ("sum", False), ("mean", True)):
        model, x, y = problem()
        attach(model, loss_reduction=reduction)
        options = {"lr": 0.1, "momentum": 0.5, "batch_size": 16, "saturation": 0.1, "over": over, "maximize": maximize}
        optimizer = SaturatingSGD(model.parameters(), **options)
        for b in (16, 1, 8, 1):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x[:b]), y[:b], reduction=reduction)
            (-loss if maximize else loss).backward()
            optimizer.step()
        results.append(vector(model))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("over", ["model", "layer"])
def test_without_a_running_average_single_examples_take_whole_steps(over):
    results = []
    for kind in (SaturatingSGD, BatchInvariantSGD):
        model, x, y = problem()
        attach(model)
        options = {"over": over} if kind is SaturatingSGD else {}
        results.append(train(model, kind(model.parameters(), lr=0.01, batch_size=1, **options), x, y, [1] * 20))
    torch.testing.assert_close(*results, rtol=0, atol=1e-10)


@pytest.mark.parametrize("over", EXTENTS)
def test_state_round_trip_continues_bitwise(over):
    """The averages of the noise scale are state; they are there before the first step, and beside those of R > B."""
    model, x, y = problem()
    attach(model)
    options = {"lr": 0.01, "batch_size": 16, "reference_batch_size": 64, "over": over}
    optimizer = SaturatingAdam(model.parameters(), **options)
    train(model, optimizer, x, y, [128, 3])
    other = copy.deepcopy(model)
    restored = SaturatingAdam(other.parameters(), **options)
    for group in restored.param_groups:
        group["lr"] = 0.0
    for p in other.parameters():
        p.grad = torch.zeros_like(p)
    restored.step()
    state = restored.state[next(other.parameters())]
    assert ("trace" in state) == (over != "coordinate") and ("variance" in state) == (over == "coordinate")
    restored.load_state_dict(optimizer.state_dict())
    assert torch.equal(train(model, optimizer, x, y, [16, 5]), train(other, restored, x, y, [16, 5]))


def test_parameters_without_gradient_have_no_state():
    model, x, y = problem()
    unused = nn.Linear(2, 2)
    attach(model)
    optimizer = SaturatingSGD([*model.parameters(), *unused.parameters()], lr=0.1, batch_size=16)
    train(model, optimizer, x, y, [16])
    assert unused.weight not in optimizer.state


def test_without_signal_and_noise_nothing_is_lost():
    model = Quartic()
    attach(model)
    optimizer = SaturatingAdam(model.parameters(), batch_size=16, weight_decay=0.0)
    before = model.p.detach().clone()
    model(before.expand(4, 3)).mean().backward()
    optimizer.step()
    assert torch.equal(model.p.detach(), before)


def test_in_examples_takes_its_options():
    model, _, _ = problem()
    optimizer = SaturatingAdam.in_examples(model.parameters(), saturation=3.0, over="layer")
    assert optimizer.param_groups[0]["saturation"] == 3.0 and optimizer.param_groups[0]["batch_size"] == 1
    optimizer.add_param_group({"params": nn.Linear(2, 2).parameters()})
    assert optimizer.param_groups[1]["over"] == "layer"


def test_refusals():
    for kind in (SaturatingSGD, SaturatingAdam):
        for name, value in (("noise_beta", 1.0), ("saturation", 0.0), ("over", "batch"), ("average", "linear")):
            with pytest.raises(GradstatsError, match=name if name != "over" else "one of .*coordinate"):
                kind(nn.Linear(2, 2).parameters(), **{name: value})
