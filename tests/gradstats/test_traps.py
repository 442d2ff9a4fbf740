"""Every trap of the table: exact, or refused by a message that names what is meant and the way out."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

import gradstats
from gradstats import GradstatsError, MissingStatistic, attach
from tests import oracle
from tests.layers import B
from tests.trap_probe import PROBE
from tests.traps import EXACT, MODES, TRAPS, Case

CASES = {
    f"{title}: {name}": case
    for title, trap in {**TRAPS, "mode": MODES, "probe": PROBE}.items()
    for name, case in trap.cases.items()
}

# Torch's advice on functions that it maps one example at a time.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")


def test_every_trap_has_a_test():
    assert list(TRAPS) == list(range(1, 23))
    here = {15: test_variance_of_gradients_far_from_zero}
    assert all(trap.cases or trap.elsewhere or number in here for number, trap in TRAPS.items())


def seed(number):
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)


def train(model, case):
    """The steps before the one that is judged."""
    for number, make in enumerate(case.before):
        seed(number)
        x = oracle.to_double(make())
        seed(number)
        oracle.call(model, x).square().mean().backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        model.zero_grad()


def use(case: Case, model: nn.Module, x, weights):
    """The attached model and its handle, after the case's step."""
    stats = attach(model.get_submodule(case.part), *oracle.STATISTICS, **case.attach)
    train(model, case)
    seed(100)
    judged = case.step(model, x, lambda output: case.loss(output, weights), stats)
    return (model, stats) if judged is None else (judged, gradstats.attached(judged))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.verdict is EXACT])
def test_exact(name):
    case = CASES[name]
    model, x = case.make().double(), oracle.to_double(case.x())
    weights = torch.rand(B, dtype=torch.float64) + 0.5
    plain = copy.deepcopy(model)
    train(plain, case)
    seed(100)
    expected = oracle.contributions(
        plain, case.loss, x, weights, case.cut, case.example_dim, case.attach.get("ignore", ())
    )
    model, stats = use(case, model, x, weights)
    assert stats.batch_size == B
    prefix = f"{case.part}." if case.part else ""
    reached = {}
    for name, c in expected.items():
        gradient = model.get_parameter(name).grad
        if gradient is None:
            assert not c.any()
        else:
            torch.testing.assert_close(gradient, c.sum(0), rtol=1e-10, atol=1e-12)
            if name.startswith(prefix):
                reached[name.removeprefix(prefix)] = c
    assert reached and oracle.exact(stats, reached)
    for name in set(stats.second_moment) - set(reached):
        with pytest.raises(MissingStatistic, match=f"'{name}' has no statistics"):
            stats.second_moment[name]


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.verdict is not EXACT])
def test_refused(name):
    case = CASES[name]

    def read_all():
        _, stats = use(case, case.make().double(), oracle.to_double(case.x()), torch.rand(B, dtype=torch.float64))
        for statistic in oracle.STATISTICS:
            dict(stats.read(statistic))

    with pytest.raises(GradstatsError, match=case.verdict):
        read_all()


def test_variance_of_gradients_far_from_zero():
    """m = 100 s in float32: the error is a few of float32's epsilon in q, not in s2, which is never below zero."""
    layer, x = nn.Linear(64, 1, bias=False), 100 + torch.randn(32, 64)
    stats = attach(layer, "second_moment", "variance")
    layer(x).mean().backward()
    s2, error = stats.variance["weight"], (stats.variance["weight"] - x.double().var(0)).abs().max()
    assert bool((s2 >= 0).all())
    assert float(error) <= 16 * torch.finfo(torch.float32).eps * 100**2
