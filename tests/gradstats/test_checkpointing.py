"""Checkpointing around calls from outside: of the attached model as a whole, or of parts that a loop drives."""

import gc
import weakref
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

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


class Positions(nn.Module):
    """A block that is recomputed, and sees positions for examples."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, 6).requires_grad_(False)
        self.block = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
        self.double()

    def forward(self, x):
        h = self.first(x).flatten(0, 1).requires_grad_()
        return checkpoint(self.block, h, use_reentrant=True).unflatten(0, x.shape[:2]).sum(1)


def thrown_away(block):
    with save_on_cpu():
        block(torch.randn(7, 6).double())


def recomputed_alone(block):
    checkpoint(block, torch.randn(7, 6).double(), use_reentrant=False).sum().backward()
    block.zero_grad()


@pytest.mark.parametrize("calls", [thrown_away, recomputed_alone])
def test_a_part_that_was_called_from_outside_before(calls):
    model, x, y = Positions(), torch.randn(4, 3, 5).double(), torch.randint(3, (4,))
    expected = oracle.contributions(model, loss_of, x, y)
    stats = attach(model, *oracle.STATISTICS)
    calls(model.block)
    loss_of(model(x), y).backward()
    assert stats.batch_size == 4 and oracle.exact(stats, expected)


def test_the_same_model_with_and_without():
    model = network()
    x, y = batch(6)
    expected = oracle.contributions(model, loss_of, x, y)
    stats = attach(model, *oracle.STATISTICS)
    first = loss_of(whole(model, x[:4], False), y[:4], reduction="sum") / 6
    stats.new_examples()
    second = loss_of(model(x[4:]), y[4:], reduction="sum") / 6
    (first + second).backward()
    assert stats.batch_size == 6 and oracle.exact(stats, expected)


@pytest.mark.parametrize("probed", [False, True])
def test_selective_checkpointing(probed):
    """It keeps what was computed in the forward, by number: nothing of the probe's."""
    model = nn.Sequential(*network(), nn.Dropout(0.5))
    x, y = batch(6)
    kept = partial(create_selective_checkpoint_contexts, [torch.ops.aten.addmm.default])
    stats = attach(model, *oracle.STATISTICS)
    if probed:
        loss_of(model(x), y).backward()
        model.zero_grad()

    def step(call):
        torch.manual_seed(0)
        loss_of(call(x), y).backward()
        found = [p.grad for p in model.parameters()], [stats.second_moment[name] for name in stats.second_moment]
        model.zero_grad()
        return found

    found = step(lambda x: checkpoint(model, x, use_reentrant=False, context_fn=kept))
    torch.testing.assert_close(found, step(model), rtol=1e-12, atol=0)


def test_a_probe_under_hooks_keeps_nothing():
    model = network()
    attach(model)
    with save_on_cpu():
        model(batch(4)[0]).sum().backward()
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


def test_an_evaluation_by_parts_between_forward_and_backward():
    model = Positions()
    x, y = torch.randn(4, 3, 5).double(), torch.randint(3, (4,))
    expected = oracle.contributions(model, loss_of, x, y)
    stats = attach(model, *oracle.STATISTICS)
    loss = loss_of(model(x), y)
    with torch.no_grad():
        checkpoint(model.block, torch.randn(7, 6).double().requires_grad_(), use_reentrant=True)
    loss.backward()
    assert stats.batch_size == 4 and oracle.exact(stats, expected)


def test_usable_after_an_exception_in_a_recomputation():
    model = nn.Sequential(*network(), nn.Identity())
    x, y = batch(4)
    expected = oracle.contributions(model, loss_of, x, y)
    stats = attach(model, *oracle.STATISTICS)

    def fails(*_):
        if torch._C._current_graph_task_id() != -1:
            raise ValueError("on purpose")

    handle = model[-1].register_forward_hook(fails)
    with pytest.raises(ValueError, match="on purpose"):
        loss_of(whole(model, x, True), y).backward()
    handle.remove()
    for _ in range(2):
        model.zero_grad()
        loss_of(whole(model, x, True), y).backward()
        assert stats.batch_size == 4 and oracle.exact(stats, expected)
