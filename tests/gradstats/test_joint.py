"""A parameter with several uses: their gradients are added up in one buffer, and returned by the first use."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gradstats import MissingStatistic, attach
from tests import oracle


class Tied(nn.Module):
    """A table that embeds and predicts; `raises` cuts the backward pass short between the two."""

    def __init__(self):
        super().__init__()
        self.embedding, self.middle, self.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9, bias=False)
        self.head.weight = self.embedding.weight
        self.raises = False

    def forward(self, ids):
        h = self.embedding(ids)
        if h.requires_grad:
            h.register_hook(self.hook)
        return self.head(torch.tanh(self.middle(h)))

    def hook(self, _):
        if self.raises:
            self.raises = False
            raise RuntimeError("cut short")


def batch_loss(output, _):
    return output.square().flatten(1).mean(1).mean()


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters()}


def test_a_backward_pass_cut_short_leaves_nothing():
    model, ids = Tied().double(), torch.randint(0, 9, (4, 6))
    expected = oracle.contributions(model, batch_loss, ids, None)
    stats = attach(model)
    loss = batch_loss(model(ids), None)
    model.raises = True
    with pytest.raises(RuntimeError, match="cut short"):
        loss.backward(retain_graph=True)
    model.zero_grad()
    model(ids)  # ends the pass that was cut short
    loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name].sum(0), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(
            stats.second_moment[name], 4 * expected[name].square().sum(0), rtol=1e-10, atol=1e-12
        )


@pytest.mark.parametrize("positions", [(), (3,)])
def test_uses_in_two_precisions_keep_each_its_own(positions):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4, bias=False)

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                x = self.layer(x)
            return self.layer(x.float().tanh())

    model, x = Twice(), torch.randn(5, *positions, 4)
    model(x).square().sum().backward()
    expected = gradients(model)
    model.zero_grad()
    attach(model, loss_reduction="sum")
    model(x).square().sum().backward()
    torch.testing.assert_close(gradients(model), expected, rtol=1e-6, atol=1e-7)


def test_a_use_that_the_loss_does_not_depend_on():
    class Detached(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.twice = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.twice(self.twice(self.first(x)).detach())

    model, x = Detached().double(), torch.randn(4, 3).double()
    F.mse_loss(model(x), x, reduction="sum").backward()
    expected = model.twice.weight.grad
    model.zero_grad()
    stats = attach(model, loss_reduction="sum")
    F.mse_loss(model(x), x, reduction="sum").backward()
    torch.testing.assert_close(model.twice.weight.grad, expected, rtol=1e-10, atol=1e-12)
    assert stats.second_moment["twice.weight"].sum() > 0
    assert model.first.weight.grad is None or not model.first.weight.grad.any()


def test_read_under_any_of_its_names():
    model = Tied()
    stats = attach(model, "second_moment")
    batch_loss(model(torch.randint(0, 9, (4, 6))), None).backward()
    assert torch.equal(stats.second_moment["head.weight"], stats.second_moment["embedding.weight"])
    with pytest.raises(MissingStatistic, match=r"no parameter 'midle.weight' .* \['middle.weight'"):
        stats.second_moment["midle.weight"]
