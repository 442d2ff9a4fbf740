"""The functional form."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradstats
from tests import oracle


@pytest.fixture
def problem():
    model = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.LayerNorm(6), nn.Linear(6, 3)).double()
    return model, torch.randn(5, 4).double(), torch.randint(0, 3, (5,))


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")  # Opacus' hook on the first layer
@pytest.mark.parametrize("engine", ["fused", "vmap", "opacus"])
def test_engines_agree_and_leave_no_trace(problem, engine):
    model, x, y = problem
    held = torch.ones_like(model[0].weight)
    model[0].weight.grad = held
    expected = oracle.contributions(model, F.cross_entropy, x, y)
    result = gradstats.compute(model, F.cross_entropy, x, y, oracle.STATISTICS, engine)
    torch.testing.assert_close(result.loss, F.cross_entropy(model(x), y).detach())
    assert result.batch_size == 5
    for name, c in expected.items():
        torch.testing.assert_close(result.gradients[name], c.sum(0))
        torch.testing.assert_close(result.second_moment[name], oracle.second_moment(c))
        torch.testing.assert_close(result.variance[name], oracle.variance(c))
        torch.testing.assert_close(result.norms[name], oracle.norms(c))
    flat = torch.cat([c.flatten(1) for c in expected.values()], 1)
    torch.testing.assert_close(result.total_norms, oracle.norms(flat))
    assert model[0].weight.grad is held and model[0].bias.grad is None
    assert all(
        type(m).__module__.startswith("torch.nn") and "_gradstats_leaf" not in m.__dict__ for m in model.modules()
    )
    assert not hasattr(model[0].weight, "grad_sample")


def test_inputs_as_tuple_and_dict():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x, scale):
            return self.layer(x) * scale

    model, x, scale, y = Two(), torch.randn(5, 4), torch.rand(5, 1), torch.randint(0, 3, (5,))
    a = gradstats.compute(model, F.cross_entropy, (x, scale), y)
    b = gradstats.compute(model, F.cross_entropy, {"scale": scale, "x": x}, y)
    torch.testing.assert_close(a.second_moment["layer.weight"], b.second_moment["layer.weight"])


def test_statistics_not_asked_for(problem):
    with pytest.raises(gradstats.MissingStatistic, match="statistics="):
        gradstats.compute(problem[0], F.cross_entropy, *problem[1:]).norms  # noqa: B018
    with pytest.raises(gradstats.GradstatsError, match="unknown statistic"):
        gradstats.compute(problem[0], F.cross_entropy, *problem[1:], statistics=["variances"])


@pytest.mark.parametrize("function", [gradstats.compute, gradstats.verify])
def test_losses_of_single_examples_are_not_at_hand(problem, function):
    model, x, y = problem
    with pytest.raises(gradstats.GradstatsError, match="loss_fn gives the loss of the batch"):
        function(model, lambda *_: pytest.fail("computed"), x, y, engine="random_sign")


def test_error_in_the_loss_restores_the_model(problem):
    model, x, _ = problem
    held = model[0].weight.grad = torch.ones_like(model[0].weight)
    with pytest.raises(ZeroDivisionError):
        gradstats.compute(model, lambda o, y: 1 / 0, x, None)
    assert model[0].weight.grad is held and type(model[0]) is nn.Linear and "_gradstats_leaf" not in model[0].__dict__
