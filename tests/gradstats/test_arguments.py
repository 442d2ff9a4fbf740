"""Which tensors of a call run over the examples; bags that are given by offsets at the model's door."""

import pytest
import torch
from torch import nn

import gradstats
from gradstats import CoverageError
from tests import oracle

OFFSETS = {"plain": [0, 2, 3, 7, 9], "some empty": [0, 3, 3, 7, 11], "equal": [0, 2, 4, 6, 8]}


class Text(nn.Module):
    """The usual model of texts."""

    def __init__(self, mode: str):
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(7, 4, mode=mode), nn.Linear(4, 2)

    def forward(self, text, offsets, weights=None):
        return self.head(self.bag(text, offsets, weights))


class FromLengths(nn.Module):
    """Makes ragged bags of padded rows by itself."""

    def __init__(self):
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(7, 4, include_last_offset=True), nn.Linear(4, 2)

    def forward(self, ids, lengths):
        text = torch.cat([row[:length] for row, length in zip(ids, lengths.tolist(), strict=True)])
        return self.head(self.bag(text, torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])))


def check(model, x, **how):
    model, weights = model.double(), torch.rand(5, dtype=torch.float64)
    expected = oracle.contributions(model, oracle.coupled_loss, x, weights)
    handle = gradstats.attach(model, *oracle.STATISTICS, **how)
    oracle.coupled_loss(oracle.call(model, x), weights).backward()
    assert oracle.exact(handle, expected)
    assert "rule EmbeddingBag" in handle.coverage()


@pytest.mark.parametrize("offsets", OFFSETS.values(), ids=OFFSETS)
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_offsets(mode, offsets):
    x = {"text": torch.randint(0, 7, (11,)), "offsets": torch.tensor(offsets)}
    check(Text(mode), x, example_dims={"text": "offsets"})


def test_arguments_by_position():
    x = torch.randint(0, 7, (11,)), torch.tensor(OFFSETS["some empty"])
    check(Text("mean"), x, example_dims={0: "1"})


def test_offsets_that_are_no_argument():
    with pytest.raises(CoverageError, match="no argument"):
        check(Text("mean"), (torch.randint(0, 7, (11,)), torch.tensor([0, 2, 3, 7, 9])), example_dims={0: "offsets"})


def test_weights():
    x = {"text": torch.randint(0, 7, (11,)), "offsets": torch.tensor(OFFSETS["some empty"])}
    x["weights"] = torch.randn(11, dtype=torch.float64)
    check(Text("sum"), x, example_dims={"text": "offsets", "weights": "offsets"})


@pytest.mark.parametrize("lengths", [[3, 0, 1, 6, 2], [3, 1, 1, 6, 2]])
def test_bags_made_inside_of_the_model(lengths):
    check(FromLengths(), (torch.randint(0, 7, (5, 6)), torch.tensor(lengths)))
