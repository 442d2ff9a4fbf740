"""Opacus as a cross-check: over a life of several steps, and where it does not follow."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gradstats import CoverageError, GradstatsError, LifetimeError, MissingStatistic, attach, attached
from tests import oracle


@pytest.fixture
def setting():
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(12, 3)).double()
    x, y = torch.randn(6, 2, 5).double(), torch.randint(0, 3, (6,))
    return model, x, y, oracle.contributions(model, F.cross_entropy, x, y)


# Opacus' full backward hooks warn when the input of the first layer needs no gradient.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")


def test_steps_and_accumulation(setting):
    model, x, y, expected = setting
    handle = attach(model, *oracle.STATISTICS, engine="opacus")
    for zero in (lambda: model.zero_grad(), lambda: None):
        F.cross_entropy(model(-x), y).backward()
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        assert handle.batch_size == 6 and oracle.exact(handle, expected)
        model.zero_grad()
        for rows in (slice(0, 2), slice(2, 6)):
            (F.cross_entropy(model(x[rows]), y[rows]) * len(x[rows]) / 6).backward()
        assert handle.batch_size == 6 and oracle.exact(handle, expected)
        zero()
        model.zero_grad()
    handle.detach()
    assert not any(hasattr(p, "grad_sample") or p._backward_hooks for p in model.parameters())


def test_evaluation_mode_is_refused(setting):
    model, x, _, _ = setting
    handle = attach(model.eval(), engine="opacus")
    with pytest.raises(CoverageError, match=r"model.train\(\)"):
        model(x)
    with torch.no_grad():
        model(x)
    with pytest.raises(MissingStatistic, match="backward"):
        handle.second_moment["3.weight"]


def test_batch_norm_is_refused():
    with pytest.raises(CoverageError, match="GroupNorm"):
        attach(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), engine="opacus")


def test_gradient_changed_after_the_backward_is_refused_where_it_matters(setting):
    model, x, y, _ = setting
    handle = attach(model, "variance", engine="opacus")
    F.cross_entropy(model(x), y).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    with pytest.raises(LifetimeError, match="changed in place"):
        handle.variance["3.weight"]


def test_contract_of_a_handle(setting):
    """Found again, not attached twice, refused where it cannot follow, and named in the table."""
    model, x, y, _ = setting
    handle = attach(model, engine="opacus")
    assert attached(model) is handle
    with pytest.raises(GradstatsError, match="attached already"):
        attach(model, engine="opacus")
    with pytest.raises(GradstatsError, match="cannot be copied"):
        copy.deepcopy(model)
    with pytest.raises(GradstatsError, match="two forwards"):
        handle.new_examples()
    assert "3.weight (3, 12) Opacus" in " ".join(handle.coverage().split())
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(MissingStatistic, match="attach\\(model, 'norms'"):
        handle.norms["3.weight"]
    handle.zero()
    with pytest.raises(MissingStatistic, match="backward"):
        handle.second_moment["3.weight"]
