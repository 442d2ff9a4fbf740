"""BatchInvariantRMSprop: torch's at the tuned batch size, its equations elsewhere."""

import copy
import math

import pytest
import torch
from torch import nn

from gradstats import GradstatsError, LifetimeError, attach
from gradstats.optim import BatchInvariantRMSprop, BatchInvariantSGD
from tests.gradstats.optim.problem import problem, train, vector

D = torch.float64
UNEVEN = [1, 7, 64, 3, 2, 1, 16, 256, 5] * 2


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"centered": True},
        {"momentum": 0.9},
        {"momentum": 0.9, "centered": True},
        {"momentum": 0.9, "centered": True, "weight_decay": 0.1},
        {"weight_decay": 0.1, "maximize": True},
    ],
)
def test_is_torchs_at_the_tuned_batch_size(options):
    model, x, y = problem()
    theirs = copy.deepcopy(model)
    attach(model)
    values = {"lr": 0.001, "alpha": 0.9} | options
    ours = BatchInvariantRMSprop(model.parameters(), batch_size=16, decoupled_weight_decay=False, **values)
    sign = -1 if "maximize" in options else 1
    a = train(model, ours, x, y, [16] * 200, sign=sign)
    b = train(theirs, torch.optim.RMSprop(theirs.parameters(), **values), x, y, [16] * 200, sign=sign)
    assert (a - b).abs().max() <= 1e-10


def test_of_the_batch_mean_it_needs_no_statistics():
    model, x, y = problem()
    theirs = copy.deepcopy(model)
    ours = BatchInvariantRMSprop(model.parameters(), 0.001, source="squared_batch_mean", batch_size=16)
    a = train(model, ours, x, y, [16] * 20, batch_size=16)
    b = train(theirs, torch.optim.RMSprop(theirs.parameters(), 0.001), x, y, [16] * 20)
    assert (a - b).abs().max() <= 1e-10


class Linear(nn.Module):
    """A loss whose gradient for an example is what the test says: c_b p, or c_b p^2 / 2."""

    def __init__(self, p, quadratic=False):
        super().__init__()
        self.p, self.quadratic = nn.Parameter(p.clone()), quadratic

    def forward(self, c):
        return (c * (self.p**2 / 2 if self.quadratic else self.p)).sum(-1)


class Twin:
    """BatchInvariantRMSprop's docstring and moment.py's."""

    def __init__(self, p, lr, alpha, eps, batch_size, r, **options):
        self.p, self.lr, self.alpha, self.eps, self.b0, self.r = p.clone(), lr, alpha, eps, batch_size, r
        self.weight_decay, self.momentum = options.get("weight_decay", 0), options.get("momentum", 0)
        self.centered, self.exponent = options.get("centered", False), options.get("exponent", 0.5)
        self.inside, self.source = options.get("eps_inside", False), options.get("source", "second_moment")
        self.estimator, self.average = options.get("estimator", "previous"), options.get("average", "ewma")
        self.e = self.e_m = self.e_q = 0
        self.s = self.m = self.q = self.v = torch.zeros_like(p)
        self.previous = None

    def rho(self, b):
        return self.alpha ** (b / self.b0)

    def moved(self, old, new, b, e):
        w = {
            "ewma": 1 - self.rho(b),
            "debiased_ewma": (1 - self.rho(b)) / (1 - self.rho(e)),
            "slides": b / min(e, max(b, self.b0 / (1 - self.alpha))),
            "mean": b / e,
        }[self.average]
        return (1 - w) * old + w * new

    def weights(self, e):
        """Their sum, in an average of e examples."""
        return 1 - self.rho(e) if self.average == "ewma" else 1

    def partner(self, m):
        if self.estimator == "previous":
            return m if self.previous is None else self.previous
        return self.m / self.weights(self.e_m) if self.e_m else m

    def step(self, g):
        b, r = len(g), math.inf if self.source == "mean_square" else self.r
        k = b / self.b0
        self.e += b
        m, q = g.mean(0), g.square().mean(0)
        across = r > b and r > 1
        if self.source == "squared_batch_mean":
            across, v = False, m.square()
        elif self.source == "variance":
            across = b == 1
            v = (q - m * self.partner(m)) / r if across else g.var(0) / r
        elif across:
            v = q / r + (1 - 1 / r) * m * self.partner(m)
        else:
            v = m.square() + (1 / r - 1 / b) * g.var(0) if b > 1 else q
        self.s = self.moved(self.s, v, b, self.e)
        if self.source != "variance" and (across or self.e_q) and r < math.inf:
            self.e_q += b
            self.q = self.moved(self.q, q, b, self.e_q)
        if across or self.previous is not None:
            self.previous = m
        if self.centered or (across and self.estimator == "running_average") or self.e_m or r == math.inf:
            self.e_m += b
            self.m = self.moved(self.m, m, b, self.e_m)
        s = self.s
        q = self.q * self.weights(self.e) / self.weights(self.e_q) if self.e_q else 0
        if self.source == "variance":
            s = s.clamp(min=0)
        if self.source == "mean_square":
            s = torch.maximum(s, self.m**2)
        if self.e_q:
            s = torch.maximum(s, q / r)
        if self.centered:
            s = torch.maximum(s - self.m**2, (q - self.m**2) / r if self.e_q else torch.zeros_like(s))
        u = m / ((s + self.eps) ** self.exponent if self.inside else s**self.exponent + self.eps)
        p = self.p * (1 - self.lr * self.weight_decay) ** k
        if self.momentum:
            self.v = self.v + k * u
            p = p - self.lr * (1 - self.momentum**k) / (1 - self.momentum) * self.v
            self.v = self.momentum**k * self.v
        else:
            p = p - k * self.lr * u
        self.p = p
        return p


@pytest.mark.parametrize(
    ("r", "options"),
    [
        (1, {}),
        (4, {"momentum": 0.8, "weight_decay": 0.1}),
        (64, {}),
        (64, {"momentum": 0.8, "exponent": 1, "eps_inside": True}),
        (4, {"centered": True}),
        (64, {"centered": True, "momentum": 0.8}),
        (64, {"estimator": "previous", "eps_inside": True}),
        (4, {"source": "variance", "exponent": 1}),
        (1, {"source": "mean_square"}),
        (1, {"source": "mean_square", "estimator": "previous"}),
        (1, {"source": "squared_batch_mean", "centered": True}),
        (4, {"average": "debiased_ewma"}),
        (64, {"average": "debiased_ewma", "centered": True}),
        (64, {"average": "slides"}),
        (64, {"average": "mean"}),
    ],
)
@pytest.mark.parametrize("sizes", [[1] * 20, [64] * 3 + [5, 3, 64, 5], UNEVEN])
def test_follows_its_equations(r, options, sizes):
    torch.manual_seed(0)
    model = Linear(torch.tensor([0.5, -1.0, 2.0], dtype=D))
    attach(model)
    args = {"lr": 0.02, "alpha": 0.9, "eps": 0.01, "batch_size": 8} | options
    optimizer = BatchInvariantRMSprop(model.parameters(), reference_batch_size=r, **args)
    twin = Twin(model.p.detach(), r=r, **args)
    for b in sizes:
        g = model.p.detach() + 0.5 + torch.randn(b, 3, dtype=D)
        expected = twin.step(g)
        optimizer.zero_grad()
        model(g).mean().backward()
        optimizer.step()
        assert (model.p - expected).abs().max() <= 1e-10


@pytest.mark.parametrize(
    ("sizes", "options", "buffers"),
    [
        ([16], {}, {"exp_avg_sq"}),
        ([16], {"centered": True, "momentum": 0.9}, {"exp_avg_sq", "exp_avg", "momentum_buffer"}),
        ([16, 4], {}, {"exp_avg_sq", "previous", "exp_avg_q"}),
        ([16, 4], {"estimator": "running_average"}, {"exp_avg_sq", "exp_avg", "exp_avg_q"}),
        ([16, 4, 1], {"estimator": "in_batch"}, {"exp_avg_sq", "exp_avg", "exp_avg_q"}),
        ([16, 4], {"source": "variance"}, {"exp_avg_sq"}),
    ],
)
def test_state_is_no_larger_than_the_estimate_takes(sizes, options, buffers):
    model, x, y = problem()
    attach(model)
    optimizer = BatchInvariantRMSprop(model.parameters(), batch_size=16, **options)
    train(model, optimizer, x, y, sizes)
    for state in optimizer.state.values():
        assert {name for name in state if not name.endswith("step")} == buffers


@pytest.mark.parametrize("momentum", [0.0, 0.8])
@pytest.mark.parametrize("source", ["second_moment", "variance"])
def test_exponent_one_does_not_notice_the_unit_of_the_parameter(momentum, source):
    """w = c u: training u or w is the same for g/sigma^2, and not for g/sigma."""
    torch.manual_seed(0)
    c = torch.tensor([0.1, 1.0, 30.0], dtype=D)
    streams = [torch.rand(b, 3, dtype=D) + 0.5 for b in [16, 4, 2] * 8]
    start = torch.tensor([1.0, -2.0, 3.0], dtype=D)
    for exponent in (0.5, 1):
        trained = []
        for unit in (1.0, c):
            model = Linear(start / unit, quadratic=True)
            attach(model)
            optimizer = BatchInvariantRMSprop(
                [model.p], 0.01, 0.9, 0, momentum=momentum, batch_size=8, exponent=exponent, source=source
            )
            for x in streams:
                optimizer.zero_grad()
                model(x * unit**2).mean().backward()
                optimizer.step()
            trained.append(model.p.detach() * unit)
        difference = (trained[0] - trained[1]).abs().max()
        assert difference <= 1e-10 if exponent == 1 else difference > 1e-3


def test_what_hardly_varies_is_centered_at_zero():
    """Rounding must not make the variance negative, whose root is nan."""
    model = Linear(torch.zeros(50, dtype=D))
    attach(model)
    optimizer = BatchInvariantRMSprop([model.p], centered=True, eps=1, average="debiased_ewma", batch_size=4)
    g = torch.rand(1, 50, dtype=D).expand(4, 50)
    for _ in range(10):
        optimizer.zero_grad()
        model(g * (1 + 1e-9 * torch.randn((), dtype=D))).mean().backward()
        optimizer.step()
    torch.testing.assert_close(model.p.detach(), -10 * 0.01 * g[0], rtol=1e-6, atol=0)


def test_is_sgd_for_a_large_eps():
    results = []
    for make in (
        lambda ps: BatchInvariantRMSprop(ps, 0.05 * 1e12, 0.9, eps=1e12, momentum=0.8, batch_size=8),
        lambda ps: BatchInvariantSGD(ps, 0.05, 0.8, batch_size=8),
    ):
        model, x, y = problem()
        attach(model)
        results.append(train(model, make(model.parameters()), x, y, [8, 3, 64, 1] * 5))
    torch.testing.assert_close(*results, rtol=0, atol=1e-9)


def test_in_examples_is_the_tuning_at_batch_size_one():
    results = []
    for make in (
        lambda ps: BatchInvariantRMSprop.in_examples(ps, 1e-3, (20, 500), weight_decay=0.1, reference_batch_size=4),
        lambda ps: BatchInvariantRMSprop(
            ps, 5e-5, 0.998, weight_decay=2, momentum=0.95, batch_size=1, reference_batch_size=4
        ),
    ):
        model, x, y = problem()
        attach(model)
        results.append(train(model, make(model.parameters()), x, y, [16, 1, 64]))
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_max_norm_bounds_the_step_over_all_parameters(momentum):
    model, x, y = problem()
    attach(model)
    # Far below eps, s is not seen: without momentum u = m, and the bound is that of m.
    optimizer = BatchInvariantRMSprop(
        model.parameters(), 0.5e9, eps=1e9, momentum=momentum, batch_size=16, max_norm=1e-3 / (1e9 if momentum else 1)
    )
    before = vector(model)
    after = train(model, optimizer, x, y, [32])
    torch.testing.assert_close((after - before).norm().item(), 32 / 16 * 0.5 / (1 - momentum) * 1e-3, rtol=1e-6, atol=0)


def test_a_clipped_gradient_is_refused_where_squares_go_with_it():
    for options in ({}, {"centered": True, "reference_batch_size": 1}):
        model, x, _ = problem()
        attach(model)
        optimizer = BatchInvariantRMSprop(model.parameters(), batch_size=16, **options)
        model(x[:8]).square().sum(1).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        with pytest.raises(LifetimeError, match="max_norm"):
            optimizer.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.0}, "alpha = 1.0"),
        ({"momentum": -0.1}, "momentum = -0.1"),
        ({"exponent": 2}, "exponent = 2: one of"),
        ({"source": "mean"}, "source = 'mean'"),
        ({"estimator": "none"}, "estimator = 'none'"),
        ({"reference_batch_size": 0.5}, "reference_batch_size = 0.5"),
        ({"average": "heavy_ball"}, "average = 'heavy_ball'"),
        ({"centered": True, "source": "variance"}, "centered=True"),
        ({"centered": True, "reference_batch_size": math.inf}, "centered=True"),
    ],
)
def test_invalid_options(options, message):
    with pytest.raises(GradstatsError, match=message):
        BatchInvariantRMSprop([nn.Parameter(torch.zeros(2))], **options)


def test_a_horizon_below_one_example_is_refused():
    with pytest.raises(GradstatsError, match="horizons"):
        BatchInvariantRMSprop.in_examples([nn.Parameter(torch.zeros(2))], horizons=(0.5, 10))
