"""Bags given by offsets, and what a bag may hold."""

import pytest
import torch
from torch import nn

import gradstats
from gradstats.rules.embedding_bag import EmbeddingBag
from tests import oracle

IDS = torch.tensor([3, 1, 1, 5, 0, 0, 6, 1, 2, 2, 2])
BAGS = {
    "plain": [0, 3, 5, 8],
    "some empty": [0, 3, 3, 11],
    "first empty": [0, 0, 4, 9],
    "one long": [0, 0, 0, 0, 0],
}


def of_rule(module: nn.EmbeddingBag, **arguments: torch.Tensor):
    """Output, contributions of the weight (n, *shape), and the gradient of per_sample_weights if given."""
    x, options = EmbeddingBag.bind(module, **arguments), EmbeddingBag.options(module)
    with torch.no_grad():
        y, saved = EmbeddingBag.forward(options, x, {"weight": module.weight})
    d = cotangent(y)
    with torch.no_grad():
        gradients, found = EmbeddingBag.backward(options, saved, d, frozenset({"weight", "per_sample_weights"}))
        c = torch.stack([found["weight"].example(n) for n in range(len(y))])
    given = arguments.get("per_sample_weights")
    return y, c, None if given is None else torch.autograd.grad(x[2], given, gradients[2])[0]


def cotangent(y: torch.Tensor) -> torch.Tensor:
    leaf = y.detach().requires_grad_()
    return torch.autograd.grad(oracle.coupled_loss(leaf, torch.linspace(1, 2, len(y), dtype=y.dtype)), leaf)[0]


def of_oracle(module: nn.EmbeddingBag, **arguments: torch.Tensor):
    """The same, by torch alone."""
    y = module(**arguments)
    d = cotangent(y)
    rows = [torch.autograd.grad(y[n], module.weight, d[n], retain_graph=True)[0] for n in range(len(y))]
    given = arguments.get("per_sample_weights")
    return y, torch.stack(rows), None if given is None else torch.autograd.grad(y, given, d)[0]


@pytest.mark.parametrize("padding_idx", [None, 1])
@pytest.mark.parametrize("mode", ["sum", "mean", "max", "weighted"])
@pytest.mark.parametrize("offsets", BAGS.values(), ids=BAGS)
@pytest.mark.parametrize("include_last_offset", [False, True])
def test_offsets(include_last_offset, offsets, mode, padding_idx):
    module = nn.EmbeddingBag(
        7,
        4,
        mode="sum" if mode == "weighted" else mode,
        padding_idx=padding_idx,
        include_last_offset=include_last_offset,
        dtype=torch.float64,
    )
    nn.init.normal_(module.weight)  # the padding row too, which begins at zero
    arguments = {"input": IDS, "offsets": torch.tensor([*offsets, len(IDS)] if include_last_offset else offsets)}
    if mode == "weighted":
        arguments["per_sample_weights"] = torch.randn(len(IDS), dtype=torch.float64, requires_grad=True)
    for found, expected in zip(of_rule(module, **arguments), of_oracle(module, **arguments), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_ids_of_32_bits():
    module = nn.EmbeddingBag(7, 4, mode="max", dtype=torch.float64)
    arguments = {"input": IDS.int(), "offsets": torch.tensor(BAGS["plain"], dtype=torch.int32)}
    for found, expected in zip(of_rule(module, **arguments)[:2], of_oracle(module, **arguments)[:2], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("offsets", [[1, 3], [0, 5, 3], [0, 12]])
def test_offsets_that_leave_ids_over_are_refused(offsets):
    with pytest.raises(ValueError, match="must rise from 0 to the end"):
        EmbeddingBag.bind(nn.EmbeddingBag(7, 4), IDS, torch.tensor(offsets))


def test_ids_after_the_last_bag_are_refused():
    with pytest.raises(ValueError, match="must rise from 0 to the end"):
        EmbeddingBag.bind(nn.EmbeddingBag(7, 4, include_last_offset=True), IDS, torch.tensor([0, 3, 8]))


class Flattened(nn.Module):
    """Makes bags of rows by itself."""

    def __init__(self):
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(7, 4, mode="max"), nn.Linear(4, 2)

    def forward(self, ids):
        return self.head(self.bag(ids.flatten(), torch.arange(0, ids.numel(), ids.shape[1])))


def test_offsets_made_inside_of_the_model():
    model, ids, weights = Flattened().double(), torch.randint(0, 7, (5, 6)), torch.rand(5, dtype=torch.float64)
    expected = oracle.contributions(model, oracle.coupled_loss, ids, weights)
    handle = gradstats.attach(model, *oracle.STATISTICS)
    oracle.coupled_loss(model(ids), weights).backward()
    assert oracle.exact(handle, expected)
    assert "rule EmbeddingBag" in handle.coverage()
