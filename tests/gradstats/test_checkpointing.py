"""Checkpointing around calls from outside: of the attached model as a whole, or of parts that a loop drives."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from gradstats import GradstatsError, attach
from tests import oracle

REENTRANT = pytest.mark.parametrize("reentrant", [False, True])
loss_of = F.cross_entropy


def batch(n):
    return torch.randn(n, 5).double().requires_grad_(), torch.randint(3, (n,))  # reentrant ones ask for a gradient


def network():
    return nn.Sequential(
        nn.Linear(5, 6), nn.Tanh(), nn.Sequential(nn.Linear(6, 6), nn.Tanh()), nn.Linear(6, 3)
    ).double()


def whole(model, x, reentrant):
    return checkpoint(model, x, use_reentrant=reentrant)


def layers(model, x, reentrant):
    for layer in model:
        x = checkpoint(layer, x, use_reentrant=reentrant)
    return x


def some_layers(model, x, reentrant):
    x = model[0](x)
    for layer in model[1:-1]:
        x = checkpoint(layer, x, use_reentrant=reentrant)
    return model[-1](x)


CALLS = pytest.mark.parametrize("call", [whole, layers, some_layers])


@CALLS
@REENTRANT
@pytest.mark.parametrize("every", [1, 2])
def test_batches_of_changing_sizes(call, reentrant, every):
    model = network()
    problems = [batch(n) for n in (4, 3, 7, 2, 5)]
    expected = [oracle.contributions(model, loss_of, x, y) for x, y in problems]
    stats = attach(model, *oracle.STATISTICS, every=every)
    for i, (x, y) in enumerate(problems):
        loss_of(call(model, x, reentrant), y).backward()
        assert stats.batch_size == len(x) and stats.gathered == (i % every == 0)
        assert not stats.gathered or oracle.exact(stats, expected[i])
        model.zero_grad()


@CALLS
@REENTRANT
def test_accumulation(call, reentrant):
    model = network()
    x, y = batch(6)
    expected = oracle.contributions(model, loss_of, x, y)
    stats = attach(model, *oracle.STATISTICS)
    for part in (slice(0, 4), slice(4, 6)):
        (loss_of(call(model, x[part], reentrant), y[part], reduction="sum") / 6).backward()
    assert stats.batch_size == 6 and oracle.exact(stats, expected)


@CALLS
def test_two_forwards_of_new_examples(call):
    model = network()
    x, y = batch(6)
    expected = oracle.contributions(model, loss_of, x, y)
    stats = attach(model, *oracle.STATISTICS)
    first = loss_of(call(model, x[:4], False), y[:4], reduction="sum") / 6
    stats.new_examples()
    second = loss_of(call(model, x[4:], False), y[4:], reduction="sum") / 6
    (first + second).backward()
    assert stats.batch_size == 6 and oracle.exact(stats, expected)


@CALLS
@REENTRANT
def test_an_evaluation_between_forward_and_backward(call, reentrant):
    model = network()
    x, y = batch(4)
    expected = oracle.contributions(model, loss_of, x, y)
    stats = attach(model, *oracle.STATISTICS)
    loss = loss_of(call(model, x, reentrant), y)
    for evaluates in (torch.no_grad, torch.inference_mode):
        with evaluates():
            model(batch(9)[0])
    loss.backward()
    assert stats.batch_size == 4 and oracle.exact(stats, expected)


@pytest.mark.parametrize(("sizes", "why"), [((4, 2), "saw 4 examples"), ((3, 3), "used by two forwards")])
def test_two_reentrant_forwards_are_refused(sizes, why):
    """The backward pass does not tell which of them it recomputes."""
    model = network()
    parts = [batch(n) for n in sizes]
    stats = attach(model)
    losses = []
    for x, y in parts:
        losses.append(loss_of(whole(model, x, True), y))
        stats.new_examples()
    with pytest.raises(GradstatsError, match=why):
        sum(losses).backward()
