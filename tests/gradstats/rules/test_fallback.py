"""Modules without a rule: what the vmap leaf covers beyond the table, and what it refuses."""

import pytest
import torch
from torch import nn

import gradstats
from gradstats import CoverageError, MissingStatistic, attach
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
@pytest.mark.parametrize("engine", ["fused", "vmap"])
def test_sharing(name, engine):
    make, x = SHARED[name]
    model, x, weights = make().double(), x(), torch.rand(B, dtype=torch.float64)
    expected = oracle.contributions(model, oracle.coupled_loss, x, weights)
    handle = attach(model, *oracle.STATISTICS, engine=engine)
    oracle.coupled_loss(model(x), weights).backward()
    assert oracle.exact(handle, expected)


def test_dropout_masks_differ_between_examples():
    model = Noisy()
    attach(model)
    y = model(torch.ones(4, 1000))
    masks = (y != 0).float()
    assert ((masks.sum(1) > 400) & (masks.sum(1) < 600)).all()
    agreement = (masks[0] == masks[1]).float().mean()
    assert 0.4 < agreement < 0.6


def test_what_does_not_vmap_runs_an_example_at_a_time():
    class Halves(nn.Module):
        """Another layer for large inputs than for small ones: control flow that depends on data."""

        def __init__(self):
            super().__init__()
            self.scale, self.large, self.small = nn.Parameter(torch.ones(4)), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return torch.stack([self.large(row) if row.sum() > 0 else self.small(row) for row in x]) * self.scale

    model, x = Halves(), torch.randn(B, 4)
    for engine in ("fused", "vmap"):
        gradstats.verify(model, oracle.coupled_loss, x, torch.rand(B), engine=engine)
    handle = attach(model)
    model(x)
    assert "loop over Halves" in handle.coverage()


def test_checkpointing_inside_a_vmap_leaf():
    row = LAYERS["checkpointed"]
    gradstats.verify(row.make(), oracle.coupled_loss, row.x(), torch.rand(B), engine="vmap")
    row = LAYERS["checkpointed, reentrant"]
    model = row.make()
    handle = attach(model, engine="vmap")
    oracle.coupled_loss(model(row.x()), torch.rand(B)).backward()
    with pytest.raises(MissingStatistic):  # the recomputation sees the module's own weights
        handle.second_moment["b.0.weight"]


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
    assert model(torch.randn(5, 5, 4), torch.eye(5)).shape == (5, 5, 4)  # the probe has seen that all share it
    model = Masked()
    attach(model)
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


def test_a_boundary_that_cannot_move_stays_where_it_was(monkeypatch):
    model, ids = Functional(), torch.randint(0, 7, (B, 6))
    stats = attach(model)
    before = stats.coverage()

    def refuses(*_):
        raise CoverageError("on purpose")

    with monkeypatch.context() as patched:
        patched.setattr(type(stats), "_add", refuses)
        with pytest.raises(CoverageError, match="on purpose"):
            model(ids)
    assert stats.coverage() == before
    model(ids).square().sum().backward()
    assert "vmap over Functional" in stats.coverage() and stats.batch_size == B
