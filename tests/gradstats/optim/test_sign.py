"""BatchInvariantSignSGD: its equations, Signum, and where the three placements agree."""

import pytest
import torch
from torch import nn

from gradstats import GradstatsError, MissingStatistic, attach
from gradstats.optim import BatchInvariantSignSGD
from gradstats.optim.sign import PLACEMENTS
from tests.gradstats.optim.problem import problem, train
from tests.gradstats.optim.quartic import Quartic, compare


class Twin:
    """The docstring, line by line."""

    def __init__(self, p, lr, momentum, weight_decay, batch_size, placement):
        self.p, self.lr, self.momentum, self.decay, self.b0 = p.clone(), lr, momentum, weight_decay, batch_size
        self.placement, self.e, self.average = placement, 0, torch.zeros_like(p)

    def step(self, g):
        b = len(g)
        self.e += b
        rho = self.momentum ** (1 / self.b0)
        w = (1 - rho**b) / (1 - rho**self.e)
        value = {"running_average": g.mean(0), "batch": g.mean(0).sign(), "example": g.sign().mean(0)}[self.placement]
        self.average = (1 - w) * self.average + w * value
        u = self.average.sign() if self.placement == "running_average" else self.average
        self.p = self.p * (1 - self.lr * self.decay) ** (b / self.b0) - b / self.b0 * self.lr * u
        return self.p


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_follows_its_equations(placement, momentum):
    args = {"lr": 0.02, "momentum": momentum, "weight_decay": 0.1, "batch_size": 8, "placement": placement}
    compare(lambda ps: BatchInvariantSignSGD(ps, **args), lambda p: Twin(p, **args), "sign_mean")


@pytest.mark.parametrize("average", ["ewma", "debiased_ewma"])
def test_is_signum_at_the_tuned_batch_size(average):
    model = Quartic()
    optimizer = BatchInvariantSignSGD(model.parameters(), lr=0.01, batch_size=4, average=average)
    p, momentum = model.p.detach().clone(), torch.zeros(3, dtype=torch.float64)
    for _ in range(100):
        x = torch.randn(4, 3, dtype=torch.float64)
        momentum = 0.9 * momentum + 0.1 * ((p - x) ** 3).mean(0)
        p = p - 0.01 * momentum.sign()
        optimizer.zero_grad()
        model(x).mean().backward()
        optimizer.step(batch_size=4)
        assert (model.p - p).abs().max() <= 1e-10


def test_placements_agree_for_single_examples_without_momentum():
    results = []
    for placement in PLACEMENTS:
        model, x, y = problem()
        attach(model, "sign_mean")
        optimizer = BatchInvariantSignSGD(model.parameters(), momentum=0, batch_size=4, placement=placement)
        results.append(train(model, optimizer, x, y, [1] * 50))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_signs_of_examples_do_not_depend_on_the_batch_size():
    """At parameters that hardly move, the average of the signs is the same however the examples are batched."""
    changes = {}
    for placement in ("example", "batch"):
        for b in (1, 16):
            model, x, y = problem()
            attach(model, "sign_mean")
            args = {"lr": 1e-12, "momentum": 0.9, "batch_size": 64, "average": "mean"}
            optimizer = BatchInvariantSignSGD(model.parameters(), **args, placement=placement)
            train(model, optimizer, x, y, [b] * (64 // b))
            changes[placement, b] = torch.cat([s["exp_avg"].flatten() for s in optimizer.state.values()])
    torch.testing.assert_close(changes["example", 1], changes["example", 16], rtol=0, atol=1e-10)
    assert (changes["batch", 1] - changes["batch", 16]).abs().max() > 0.1


def test_maximize_ascends():
    for placement in PLACEMENTS:
        results = []
        for maximize, sign in ((True, -1), (False, 1)):
            model, x, y = problem()
            attach(model, "sign_mean")
            optimizer = BatchInvariantSignSGD(
                model.parameters(), lr=0.01, batch_size=16, placement=placement, maximize=maximize
            )
            results.append(train(model, optimizer, x, y, [16, 4, 1], sign=sign))
        assert torch.equal(*results)


def test_refusals():
    model, x, y = problem()
    attach(model)
    optimizer = BatchInvariantSignSGD(model.parameters(), placement="example")
    with pytest.raises(MissingStatistic, match="sign_mean"):
        train(model, optimizer, x, y, [4])
    for name, value in (("momentum", 1.0), ("placement", "after"), ("average", "linear")):
        with pytest.raises(GradstatsError, match=name if name != "average" else "debiased_ewma"):
            BatchInvariantSignSGD(nn.Linear(2, 2).parameters(), **{name: value})
