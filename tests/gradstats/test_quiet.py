import sys
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradstats import CoverageError, attach

B = 4


def batch(n=B):
    return torch.randn(n, 5).double(), torch.randint(3, (n,))


def network(depth=1):
    body = [layer for _ in range(depth) for layer in (nn.Linear(5, 5), nn.Tanh())]
    return nn.Sequential(*body, nn.Linear(5, 3)).double()


def in_quiet_window(model):
    """Statistics of the model, whose first window is over, and with it the last one that is gathered."""
    stats = attach(model, every=10**6)
    x, y = batch()
    F.cross_entropy(logits(model(x)), y).backward()
    assert stats.gathered
    model.zero_grad()
    return stats


def logits(output):
    return output if isinstance(output, Tensor) else output.logits


@dataclass
class Output:
    """No tensor, and no container that torch knows."""

    logits: Tensor


class Hidden(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 3).double()

    def forward(self, x):
        return Output(self.layer(x))


class Branches(nn.Module):
    """The second branch is the first call's only, and ends late in it."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 3).double(), nn.Linear(5, 3).double()

    def forward(self, x, both=False):
        return self.second(x) + self.first(x) if both else self.first(x)


@pytest.mark.parametrize("model", [network(), Hidden()])
def test_examples_are_counted_whatever_the_model_returns(model):
    stats = in_quiet_window(model)
    for i in range(1, 4):
        x, y = batch(i)
        F.cross_entropy(logits(model(x)), y).backward()
        assert not stats.gathered and stats.batch_size == sum(range(1, i + 1))
    model.zero_grad()
    x, y = batch(2)
    F.cross_entropy(logits(model(x)), y).backward()
    assert stats.batch_size == 2


def test_a_loss_beside_what_is_returned():
    model = network()
    stats = in_quiet_window(model)
    features = []
    model[1].register_forward_hook(lambda module, args, output: features.append(output))
    model(batch(3)[0])
    features[0].square().mean().backward()
    assert stats.batch_size == 3 and stats.has("0.weight") and not stats.has("2.weight")


@pytest.mark.parametrize("both", [(True, False), (False, True)])
def test_forwards_of_different_examples_in_one_pass(both):
    model = Branches()
    stats = in_quiet_window(model)
    losses = []
    for n, branch in zip((2, 3), both, strict=True):
        x, y = batch(n)
        losses.append(F.cross_entropy(model(x, both=branch), y))
        stats.new_examples()
    sum(losses).backward()
    assert not stats.gathered and stats.batch_size == 5
    assert stats.has("second.weight")


def test_forwards_of_one_generation_have_one_size():
    model = network()
    in_quiet_window(model)
    loss = model(batch(2)[0]).sum() + model(batch(3)[0]).sum()
    with pytest.raises(CoverageError, match=r"stats.new_examples\(\)"):
        loss.backward()


def test_only_the_forward_that_is_backpropagated_counts():
    model = network()
    stats = in_quiet_window(model)
    (x, y), (other, _) = batch(2), batch(3)
    loss = F.cross_entropy(model(x), y)
    stats.new_examples()
    model(other)
    loss.backward()
    assert stats.batch_size == 2


@pytest.mark.parametrize("model", [network(), Hidden()])
def test_autograd_grad_counts_nothing(model):
    stats = in_quiet_window(model)
    x, y = batch(2)
    loss = F.cross_entropy(logits(model(x)), y)
    torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    assert stats.batch_size == B and stats.gathered  # the window before
    loss.backward()
    assert stats.batch_size == 2 and not stats.gathered


def test_a_forward_that_fails_leaves_no_quiet_behind():
    model = network()
    stats = in_quiet_window(model)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(torch.randn(2, 6).double())
    stats.zero()  # the next window is gathered
    x, y = batch(2)
    F.cross_entropy(model(x), y).backward()
    assert stats.gathered and stats.batch_size == 2


def test_a_gradient_that_comes_without_a_forward_is_refused():
    model = network()
    stats = in_quiet_window(model)
    x, y = batch()
    F.cross_entropy(model(x), y).backward()
    sum(p.square().sum() for p in model.parameters()).backward()
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(Exception, match="holds more than these statistics have seen"):
        stats.second_moment["0.weight"]


def test_a_layer_takes_few_calls():
    """Of Python, which is what a window that is not gathered costs; every layer's own hooks took above 140."""

    def calls(depth, attached):
        model, (x, y), counted = network(depth), batch(), 0
        stats = in_quiet_window(model) if attached else None

        def count(frame, event, argument):
            nonlocal counted
            counted += event in ("call", "c_call")

        for profile in (None, count):
            model.zero_grad()
            sys.setprofile(profile)
            try:
                F.cross_entropy(model(x), y).backward()
            finally:
                sys.setprofile(None)
        assert stats is None or not stats.gathered
        return counted

    assert calls(6, True) - calls(6, False) - (calls(2, True) - calls(2, False)) <= 4 * 100
