"""Modules without a rule: what the vmap leaf covers beyond the table, and what it refuses."""

import pytest
import torch
from torch import nn

import gradstats
from gradstats import CoverageError, attach
from tests import oracle
from tests.layers import LAYERS, B


class Noisy(nn.Module):
    """No rule, with dropout: every example must draw a mask of its own."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1000))

    def forward(self, x):
        return nn.functional.dropout(x * self.scale, 0.5, training=self.training)


class Tied(nn.Module):
    """Embedding and head share one weight, so their contributions have a cross term; the padding row learns by the head
    only."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4, padding_idx=2)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.embedding(x).tanh())


class Functional(nn.Module):
    """A child's weight used functionally."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)

    def forward(self, x):
        return nn.functional.linear(self.embedding(x), self.embedding.weight)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(self.layer(x).tanh())


SHARED = {
    "tied": (Tied, lambda: torch.randint(0, 7, (B, 6))),
    "functional": (Functional, lambda: torch.randint(0, 7, (B, 6))),
    "called twice": (Twice, lambda: torch.randn(B, 4, dtype=torch.float64)),
}


@pytest.mark.parametrize("name", SHARED)
def test_sharing_is_refused_by_fused_and_exact_under_vmap(name):
    make, x = SHARED[name]
    model, x, weights = make().double(), x(), torch.rand(B, dtype=torch.float64)
    expected = oracle.contributions(model, oracle.coupled_loss, x, weights)
    with pytest.raises(gradstats.GradstatsError, match="engine='vmap'"), attach(model):
        oracle.coupled_loss(model(x), weights).backward()
    model.zero_grad()
    handle = attach(model, "second_moment", "variance", "norms", engine="vmap")
    oracle.coupled_loss(model(x), weights).backward()
    assert oracle.worst(oracle.errors(handle, expected)) <= 1e-10


def test_dropout_masks_differ_between_examples():
    model = Noisy()
    attach(model)
    y = model(torch.ones(4, 1000))
    masks = (y != 0).float()
    assert ((masks.sum(1) > 400) & (masks.sum(1) < 600)).all()
    agreement = (masks[0] == masks[1]).float().mean()
    assert 0.4 < agreement < 0.6


@pytest.mark.parametrize("make", [lambda: nn.LSTM(4, 3), lambda: nn.GRU(4, 3, batch_first=True)])
def test_recurrent_layers_are_refused(make):
    with pytest.raises(CoverageError, match="no batching rule"):
        attach(make())


def test_positions_before_examples_are_refused():
    with pytest.raises(CoverageError, match="batch_first=True"):
        attach(nn.MultiheadAttention(4, 2))


def test_checkpointing_under_vmap_is_refused():
    for name in ("checkpointed", "checkpointed, reentrant"):
        row = LAYERS[name]
        model = row.make()
        attach(model, engine="vmap")
        with pytest.raises(CoverageError, match=r"torch.func"):
            oracle.coupled_loss(model(row.x()), torch.rand(B)).backward()


def test_square_argument_that_could_be_a_mask_is_refused():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))

        def forward(self, x, mask):
            return (mask @ x) * self.scale

    model = Masked()
    attach(model)
    assert model(torch.randn(3, 5, 4), torch.eye(5)).shape == (3, 5, 4)
    with pytest.raises(CoverageError, match="square shared by all"):
        model(torch.randn(5, 5, 4), torch.eye(5))


def test_outputs_that_are_no_batch_are_refused():
    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))

        def forward(self, x):
            return (x * self.scale).mean()

    model = Loss()
    attach(model)
    with pytest.raises(CoverageError, match="outside of the attached module"):
        model(torch.randn(5, 4))


def test_tuple_and_none_outputs_pass():
    model = nn.MultiheadAttention(4, 2, batch_first=True)
    x = torch.randn(3, 5, 4)
    plain = model(x, x, x)
    attach(model)
    out, weights = model(x, x, x)
    torch.testing.assert_close(out, plain[0])
    torch.testing.assert_close(weights, plain[1])
    assert model(query=x, key=x, value=x, need_weights=False)[1] is None
