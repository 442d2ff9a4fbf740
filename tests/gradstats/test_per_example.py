"""per_example_gradients beyond the table of layers."""

import pytest
import torch
from torch import nn

from gradstats import CoverageError, per_example_gradients


def test_scale():
    model, x = nn.Linear(4, 1, bias=False), torch.randn(5, 4)
    mean = per_example_gradients(model, lambda o, y: o.mean(), x, None)
    total = per_example_gradients(model, lambda o, y: o.sum(), x, None, loss_reduction="sum")
    torch.testing.assert_close(mean["weight"].squeeze(1), x)
    torch.testing.assert_close(total["weight"].squeeze(1), x)


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_dropout_is_independent_between_examples(chunk_size):
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(1000, 1, bias=False))
    g = per_example_gradients(model, lambda o, y: o.mean(), torch.ones(4, 1000), None, chunk_size=chunk_size)
    masks = (g["1.weight"].squeeze(1) != 0).float()
    assert all(0.4 < (masks[i] == masks[j]).float().mean() < 0.6 for i in range(4) for j in range(i))


def test_frozen_parameters_are_left_out():
    model = nn.Linear(4, 3)
    model.bias.requires_grad_(False)
    assert set(per_example_gradients(model, lambda o, y: o.mean(), torch.randn(5, 4), None)) == {"weight"}


@pytest.mark.parametrize(
    ("model", "x", "match"),
    [
        (nn.MultiheadAttention(4, 2), tuple(torch.randn(5, 3, 4) for _ in range(3)), "no dimension of examples"),
        (nn.LSTM(4, 2, batch_first=True), torch.randn(5, 3, 4), "batching rule"),
        (nn.Bilinear(5, 5, 2), (torch.randn(5, 5), torch.randn(5, 5)), "or shared by all"),
    ],
)
def test_what_attach_refuses_is_refused(model, x, match):
    with pytest.raises(CoverageError, match=match):
        per_example_gradients(model, lambda o, y: o[0].mean(), x, None)


def test_none_among_the_outputs():
    model = nn.MultiheadAttention(4, 2, batch_first=True)
    x = torch.randn(5, 3, 4)
    inputs = {"query": x, "key": x, "value": x, "need_weights": False}
    g = per_example_gradients(model, lambda o, y: o[0].square().mean(), inputs, None)
    model(**inputs)[0].square().mean().backward()
    torch.testing.assert_close(g["in_proj_weight"].mean(0), model.in_proj_weight.grad)


def test_batch_norm_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    with pytest.raises(CoverageError, match="GroupNorm"):
        per_example_gradients(model, lambda o, y: o.mean(), torch.randn(5, 4), None)
