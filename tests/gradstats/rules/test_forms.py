"""Forms of contributions that only one rule has: whole, in tiles, an example, a position or a group at a time."""

import pytest
import torch
from torch import nn

from gradstats.blocks import CACHED
from gradstats.contribution import Streamed
from gradstats.errors import CoverageError
from gradstats.rules.bilinear import Products
from gradstats.rules.convolution import Convolution
from gradstats.rules.convolution_weight import gathered
from gradstats.rules.registry import Rule
from gradstats.rules.transposed import TransposedConvolution
from tests.allocations import LargestAllocation

N = 6


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


def products(positions):
    d, x, z = randn(N, positions, 4), randn(N, positions, 3), randn(N, positions, 5)
    return Products(d, x, z), torch.einsum("nto,nti,ntj->noij", d, x, z)


def convolution(rule: type[Rule], layer: nn.Module):
    x = randn(N, 4, *(4, 3, 5)[: layer.weight.dim() - 2])
    y = layer.double()(x)
    d = torch.randn_like(y)
    _, saved = rule.forward(rule.options(layer), rule.bind(layer, x), dict(layer.named_parameters()))
    form = rule.backward(rule.options(layer), saved, d, frozenset({"weight"}))[1]["weight"]
    rows = [torch.autograd.grad(y[n], layer.weight, d[n], retain_graph=True)[0] for n in range(N)]
    return form, torch.stack(rows)


FORMS = {
    "products, one position": lambda: products(1),
    "products": lambda: products(2),
    "convolution": lambda: convolution(Convolution, nn.Conv2d(4, 6, 2, padding="same", padding_mode="circular")),
    "convolution, groups": lambda: convolution(Convolution, nn.Conv2d(4, 6, 2, groups=2)),
    "transposed": lambda: convolution(TransposedConvolution, nn.ConvTranspose2d(4, 6, (2, 3), stride=2)),
    "convolution, 1d": lambda: convolution(Convolution, nn.Conv1d(4, 6, 2, stride=2, padding=1)),
    "convolution, 3d": lambda: convolution(
        Convolution, nn.Conv3d(4, 5, (2, 1, 3), padding=(1, 0, 2), dilation=(2, 1, 1))
    ),
    "convolution, 1x1": lambda: convolution(Convolution, nn.Conv2d(4, 6, 1, stride=2)),
    "transposed, padded": lambda: convolution(
        TransposedConvolution, nn.ConvTranspose2d(4, 6, 3, stride=2, padding=(1, 0), output_padding=1, dilation=(1, 2))
    ),
    "transposed, groups": lambda: convolution(TransposedConvolution, nn.ConvTranspose2d(4, 6, 2, groups=2)),
}


@pytest.fixture(params=FORMS)
def form(request):
    """A form, and the contributions (n, *shape) that it stands for."""
    made, c = FORMS[request.param]()
    with torch.no_grad():
        yield made, c


def same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_reductions(form):
    made, c = form
    assert made.shape == c.shape[1:]
    same(made.gradient(), c.sum(0))
    same(torch.stack([made.example(n).clone() for n in range(N)]), c)
    for names in (["sum_of_squares"], ["squared_norms"], ["sum_of_squares", "squared_norms"]):
        gradient, found = made.sums(names)
        same(gradient, c.sum(0))
        assert found.keys() == set(names)
        same(found.get("sum_of_squares", c.square().sum(0)), c.square().sum(0))
        same(found.get("squared_norms", c.square().flatten(1).sum(1)), c.square().flatten(1).sum(1))


@pytest.mark.parametrize("numbers", [1, 300, 10**6])
@pytest.mark.parametrize("name", [name for name in FORMS if "products" not in name])
def test_every_way_of_a_convolution(name, numbers, monkeypatch):
    """A few examples at a time, or all."""
    monkeypatch.setattr("gradstats.rules.convolution_weight.BLOCK", numbers)
    monkeypatch.setattr("gradstats.rules.convolution_weight.CACHED", 2 * numbers)
    made, c = FORMS[name]()
    names = ["sum_of_squares", "squared_norms"]
    ways = {"grouped": lambda: gathered(made.grouped(), names, made), "examples": made.ways(names)["examples"]}
    if "groups" not in name:
        ways["unfolded"] = lambda: gathered(made.unfolded(), names, made)
    with torch.no_grad():
        for way in ways.values():
            gradient, found = way()
            same(gradient, c.sum(0))
            same(found["sum_of_squares"], c.square().sum(0))
            same(found["squared_norms"], c.square().flatten(1).sum(1))


def ways_of(layer: nn.Module, *positions: int) -> list[str]:
    x = torch.randn(2, layer.in_channels, *positions)
    y, saved = Convolution.forward(Convolution.options(layer), x, dict(layer.named_parameters()))
    with torch.no_grad():
        form = Convolution.backward(Convolution.options(layer), saved, y, frozenset({"weight"}))[1]["weight"]
        return list(form.ways(["sum_of_squares"]))


def test_ways_worth_measuring():
    assert ways_of(nn.Conv2d(3, 8, 3), 9, 9) == ["grouped", "examples"]
    assert ways_of(nn.Conv2d(256, 64, 3, padding=1), 8, 8) == ["examples", "unfolded"]
    assert ways_of(nn.Conv2d(32, 256, 3, padding=1), 8, 8) == ["unfolded", "grouped", "examples"]
    assert ways_of(nn.Conv2d(512, 512, 3, padding=1), 4, 4) == ["unfolded"]
    assert ways_of(nn.Conv2d(512, 512, 3, padding=1, groups=512), 4, 4) == ["grouped", "examples"]


@pytest.mark.parametrize("limit", [1, 7 * N, 11 * N, 10**6])
def test_tiles(form, limit):
    made, c = form
    seen = torch.full((N, c[0].numel()), torch.nan, dtype=c.dtype)
    for block in made.blocks(limit):
        assert block.c.numel() <= max(limit, N)
        seen[:, block.elements] = block.c
    same(seen, c.flatten(1))


def test_groups(form):
    made, c = form
    merged = made.merged(3)
    assert merged.count == 2
    same(torch.stack([merged.example(n).clone() for n in range(2)]), c.unflatten(0, (2, 3)).sum(1))


def test_positions_of_products():
    made, _ = products(2)
    tokens = made.per_token()
    expected = torch.einsum("to,ti,tj->toij", *(factor.flatten(0, 1) for factor in (made.d, made.x, made.z)))
    same(torch.stack([tokens.example(n) for n in range(tokens.count)]), expected)


def test_positions_of_a_convolution_are_refused():
    made, _ = FORMS["transposed"]()
    with pytest.raises(CoverageError, match="granularity='example'"):
        made.per_token()


@pytest.mark.parametrize("positions", [1, 2])
def test_products_of_all_examples_are_never_at_hand(positions):
    n, width = 32, 16
    form = Products(*(torch.randn(n, positions, width) for _ in range(3)))
    with LargestAllocation() as largest:
        form.sums(["sum_of_squares", "squared_norms"])
    assert width**3 <= largest.elements <= n * width**2


@pytest.mark.parametrize("way", ["examples", "grouped", "unfolded"])
def test_contributions_of_a_convolution_are_never_all_at_hand(way, monkeypatch):
    monkeypatch.setattr("gradstats.rules.convolution_weight.BLOCK", 0)
    n, positions = 64, 8
    layer = nn.Conv1d(64, 128, 9, padding=4, bias=False)
    x, d, weight = torch.randn(n, 64, positions), torch.randn(n, 128, positions), layer.weight.detach()
    form = Convolution.backward(Convolution.options(layer), (x, weight), d, frozenset({"weight"}))[1]["weight"]
    names = ["sum_of_squares", "squared_norms"]
    ways = {"grouped": lambda: gathered(form.grouped(), names, form)} | form.ways(names)
    if way == "examples":
        ways[way] = lambda: Streamed.direct(form, names)
    with LargestAllocation() as largest:
        ways[way]()
    assert largest.elements <= CACHED < n * 64 * 9 * positions < n * weight.numel()
