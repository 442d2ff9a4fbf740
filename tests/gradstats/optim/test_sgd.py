"""BatchInvariantSGD: torch's at the tuned batch size, its equations elsewhere, and one example's total effect."""

import copy

import pytest
import torch
from torch import nn

from gradstats import GradstatsError, MissingStatistic, attach
from gradstats.optim import BatchInvariantSGD
from tests.gradstats.optim.problem import problem, train

D = torch.float64
UNEVEN = [1, 7, 64, 3, 2, 1, 16, 256, 5] * 5


def step(optimizer, p, g):
    """One step of a parameter of no model, from per-example gradients g (B, *shape)."""
    p.grad = g.mean(0)
    optimizer.step(batch_size=len(g))
    return p.detach().clone()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": 0.7},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.9, "weight_decay": 0.1},
        {"momentum": 0.9, "weight_decay": 0.1, "maximize": True},
        {"momentum": 0.9, "average": "ewma", "weight_decay": 0.1},
        {"momentum": 0.9, "average": "ewma", "nesterov": True},
    ],
)
def test_is_torchs_at_the_tuned_batch_size(options):
    model, x, y = problem()
    theirs = copy.deepcopy(model)
    ours = BatchInvariantSGD(model.parameters(), lr=0.05, batch_size=16, decoupled_weight_decay=False, **options)
    torchs = torch.optim.SGD(theirs.parameters(), lr=0.05, **{n: v for n, v in options.items() if n != "average"})
    sign = -1 if "maximize" in options else 1
    a = train(model, ours, x, y, [16] * 200, sign=sign, batch_size=16)
    b = train(theirs, torchs, x, y, [16] * 200, sign=sign)
    assert (a - b).abs().max() <= 1e-10


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_decoupled_decay_is_torchs_step_after_a_decay(momentum):
    model, x, y = problem()
    theirs = copy.deepcopy(model)
    attach(model)
    ours = BatchInvariantSGD(model.parameters(), lr=0.05, momentum=momentum, weight_decay=0.1, batch_size=16)
    torchs = torch.optim.SGD(theirs.parameters(), lr=0.05, momentum=momentum)

    def decay(*_):
        torch._foreach_mul_([p.data for p in theirs.parameters()], 1 - 0.05 * 0.1)

    torchs.register_step_pre_hook(decay)
    a, b = train(model, ours, x, y, [16] * 200), train(theirs, torchs, x, y, [16] * 200)
    assert (a - b).abs().max() <= 1e-10


def test_torchs_heavy_ball_is_the_slides_average_with_another_learning_rate():
    """lr = B lr0 / N_g, with N_g = 1 / (1 - momentum) in steps."""
    b, lr0, steps = 16, 0.004, 10
    model, x, y = problem()
    theirs = copy.deepcopy(model)
    momentum = 1 - 1 / steps
    slides = BatchInvariantSGD.in_examples(model.parameters(), lr0, 1 / (1 - momentum ** (1 / b)), average="ewma")
    heavy_ball = torch.optim.SGD(theirs.parameters(), b * lr0 / steps, momentum)
    a = train(model, slides, x, y, [b] * 200, batch_size=b)
    assert (a - train(theirs, heavy_ball, x, y, [b] * 200)).abs().max() <= 1e-10


class Twin:
    """BatchInvariantSGD's docstring. The heavy ball remembers every push: one of E' examples ago has rho^E' left."""

    def __init__(self, p, lr, momentum, dampening, weight_decay, nesterov, batch_size, average, decoupled):
        self.p, self.lr, self.momentum, self.dampening, self.nesterov = p.clone(), lr, momentum, dampening, nesterov
        self.decay, self.b0, self.average, self.decoupled = weight_decay, batch_size, average, decoupled
        self.e = 0
        self.pushes = []
        self.g = torch.zeros_like(p)

    def weight(self, b):
        rho, horizon = self.momentum ** (1 / self.b0), self.b0 / (1 - self.momentum)
        return {
            "ewma": 1 - rho**b,
            "debiased_ewma": (1 - rho**b) / (1 - rho**self.e),
            "slides": b / min(self.e, max(b, horizon)),
            "mean": b / self.e,
        }[self.average]

    def step(self, g):
        b, before = len(g), self.e
        k, self.e = b / self.b0, self.e + b
        m = g.mean(0)
        if self.decoupled:
            p = self.p * (1 - self.lr * self.decay) ** k
        else:
            p, m = self.p, m + self.decay * self.p
        if self.average == "heavy_ball":
            weights = [1 if e < self.b0 else 1 - self.dampening for e in range(before, self.e)]
            push = sum(weights) / self.b0 * m
            self.pushes.append((before, push))
            rho = self.momentum ** (1 / self.b0)
            moved = sum(push * (rho ** (before - e) - rho ** (self.e - e)) for e, push in self.pushes)
        else:
            w = self.weight(b)
            self.g = (1 - w) * self.g + w * m
            push, moved = k * (1 - self.dampening) * m, k * (1 - self.dampening) * self.g
        if self.nesterov:
            moved = self.momentum * moved + (1 - self.momentum) * push
        self.p = p - self.lr / (1 - self.momentum) * moved
        return self.p


@pytest.mark.parametrize(
    ("average", "dampening", "nesterov", "weight_decay", "decoupled"),
    [
        ("heavy_ball", 0.0, False, 0.1, True),
        ("heavy_ball", 0.0, True, 0.1, False),
        ("heavy_ball", 0.6, False, 0.0, True),
        ("ewma", 0.6, False, 0.1, False),
        ("debiased_ewma", 0.6, True, 0.0, True),
        ("slides", 0.0, True, 0.1, True),
        ("mean", 0.0, False, 0.1, True),
    ],
)
@pytest.mark.parametrize("sizes", [[8] * 40, [1] * 60, UNEVEN])
def test_follows_its_equations(average, dampening, nesterov, weight_decay, decoupled, sizes):
    torch.manual_seed(0)
    p = nn.Parameter(torch.tensor([0.5, -1.0, 2.0], dtype=D))
    args = {
        "lr": 0.005,
        "momentum": 0.8,
        "dampening": dampening,
        "weight_decay": weight_decay,
        "nesterov": nesterov,
        "batch_size": 8,
        "average": average,
    }
    optimizer = BatchInvariantSGD([p], decoupled_weight_decay=decoupled, **args)
    twin = Twin(p.detach(), decoupled=decoupled, **args)
    for b in sizes:
        g = p.detach() - torch.randn(b, 3, dtype=D)
        expected = twin.step(g)
        assert (step(optimizer, p, g) - expected).abs().max() <= 1e-10
    assert optimizer.state[p]["step"] == sum(sizes)
    assert len(optimizer.state[p]) == 2


def total_effect(optimizer, p, before, after):
    """Where one step, on the gradient 1 of one of its examples, has moved p long after it."""
    for b in before:
        step(optimizer, p, torch.zeros(b, 1, dtype=D))
    start = p.detach().clone()
    g = torch.zeros(next(after), 1, dtype=D)
    g[0] = 1.0
    step(optimizer, p, g)
    for b in after:
        step(optimizer, p, torch.zeros(b, 1, dtype=D))
    return (start - p.detach()).item()


@pytest.mark.parametrize("average", ["heavy_ball", "ewma", "slides"])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("horizon", [1.5, 20, 120])
@pytest.mark.parametrize("b", [1, 4, 100])
def test_one_example_moves_the_parameters_by_lr_in_total(average, nesterov, horizon, b):
    p = nn.Parameter(torch.zeros(1, dtype=D))
    optimizer = BatchInvariantSGD.in_examples([p], 0.01, horizon, average=average, nesterov=nesterov)
    # The slides' average is the plain mean before one horizon has passed, and forgets by (1 - B/N) a step.
    before = [b] * -(-int(horizon) // b) if average == "slides" else [b]
    after = [b] * (2 + int(25 * horizon / b))
    assert abs(total_effect(optimizer, p, before, iter(after)) - 0.01) <= 1e-12


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_the_heavy_balls_total_effect_does_not_depend_on_the_sizes_of_batches(nesterov, seed):
    torch.manual_seed(seed)
    sizes = [int(b) for b in torch.randint(1, 60, (300,)) ** 2 // 60 + 1]
    p = nn.Parameter(torch.zeros(1, dtype=D))
    optimizer = BatchInvariantSGD.in_examples([p], 0.01, 50, nesterov=nesterov)
    assert abs(total_effect(optimizer, p, sizes[:5], iter(sizes[5:])) - 0.01) <= 1e-12


def test_dampening_spares_the_first_examples_whatever_their_batches():
    moved = []
    for sizes in ([8, 8], [4] * 4, [1] * 16, [16]):
        p = nn.Parameter(torch.zeros(1, dtype=D))
        optimizer = BatchInvariantSGD([p], 0.1, momentum=0.5, dampening=0.75, batch_size=8)
        for b in sizes:
            step(optimizer, p, torch.ones(b, 1, dtype=D))
        for _ in range(60):
            step(optimizer, p, torch.zeros(8, 1, dtype=D))
        moved.append(-p.item())
    expected = 0.1 / 0.5 * (1 + 0.25)
    assert all(abs(m - expected) <= 1e-12 for m in moved)


def test_batches_of_many_horizons_leave_no_velocity_and_no_nan():
    p = nn.Parameter(torch.zeros(3))
    optimizer = BatchInvariantSGD.in_examples([p], 1e-3, horizon=2)
    for _ in range(3):
        before = p.detach().clone()
        after = step(optimizer, p, torch.ones(5000, 3))
        torch.testing.assert_close(before - after, torch.full((3,), 5.0))


def test_in_examples_is_the_tuning_at_batch_size_one():
    results = []
    for make in (
        lambda ps: BatchInvariantSGD.in_examples(ps, lr=1e-3, horizon=100, weight_decay=0.5, average="slides"),
        lambda ps: BatchInvariantSGD(ps, lr=1e-5, momentum=0.99, weight_decay=50, batch_size=1, average="slides"),
    ):
        model, x, y = problem()
        attach(model)
        results.append(train(model, make(model.parameters()), x, y, [16, 1, 64]))
    assert torch.equal(*results)


@pytest.mark.parametrize("decoupled", [True, False])
def test_decay_in_examples_does_not_depend_on_the_horizon(decoupled):
    results = []
    for horizon in (1, 5, 25):
        p = nn.Parameter(torch.ones(1, dtype=D))
        optimizer = BatchInvariantSGD.in_examples(
            [p], 1e-5, horizon, weight_decay=0.1, decoupled_weight_decay=decoupled
        )
        for _ in range(500):
            step(optimizer, p, torch.zeros(2, 1, dtype=D))
        results.append(1 - p.item())
    assert all(abs(r / (1000 * 1e-5 * 0.1) - 1) < (1e-3 if decoupled else 0.03) for r in results)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.9, "average": "debiased_ewma", "nesterov": True},
    ],
)
@pytest.mark.parametrize("b", [4, 16, 64])
def test_max_norm_bounds_the_average_over_all_parameters(options, b):
    """A constant gradient of norm 5 in units of which the bound is 1: every step is a fifth."""
    moved = []
    for max_norm in (None, 1.0):
        ps = [nn.Parameter(torch.zeros(1, dtype=D)), nn.Parameter(torch.zeros(1, dtype=D))]
        optimizer = BatchInvariantSGD(ps, 0.1, batch_size=16, max_norm=max_norm, **options)
        for _ in range(800):
            ps[0].grad, ps[1].grad = torch.full((1,), 3.0, dtype=D), torch.full((1,), 4.0, dtype=D)
            before = torch.cat(ps).detach()
            optimizer.step(batch_size=b)
        moved.append(before - torch.cat(ps).detach())
    expected = b / 16 * 0.1 / (1 - options.get("momentum", 0)) * torch.tensor([0.6, 0.8], dtype=D)
    torch.testing.assert_close(moved[1], expected)
    torch.testing.assert_close(moved[0], 5 * expected)


def test_without_momentum_there_is_no_state():
    for average in ("heavy_ball", "slides"):
        p = nn.Parameter(torch.zeros(2))
        optimizer = BatchInvariantSGD([p], average=average)
        step(optimizer, p, torch.ones(3, 2))
        assert set(optimizer.state[p]) == {"step"}


def test_without_a_model_the_batch_size_is_asked_for():
    p = nn.Parameter(torch.zeros(2))
    p.grad = torch.ones(2)
    with pytest.raises(MissingStatistic, match=r"step\(batch_size=...\)"):
        BatchInvariantSGD([p]).step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": 1.0}, "momentum = 1.0"),
        ({"dampening": 1.0}, "dampening = 1.0"),
        ({"average": "linear"}, "average = 'linear': one of .*heavy_ball.*slides"),
        ({"nesterov": True}, "needs a momentum"),
        ({"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "debiased_ewma"),
    ],
)
def test_invalid_options(options, message):
    with pytest.raises(GradstatsError, match=message):
        BatchInvariantSGD([nn.Parameter(torch.zeros(2))], **options)


def test_a_horizon_below_one_example_is_refused():
    with pytest.raises(GradstatsError, match="horizon"):
        BatchInvariantSGD.in_examples([nn.Parameter(torch.zeros(2))], horizon=0.5)
