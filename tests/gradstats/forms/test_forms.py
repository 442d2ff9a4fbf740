"""Every form of contributions, and those that only one rule has in tiles, by example, by position and in groups."""

from inspect import isabstract

import pytest
import torch
from torch import nn

from gradstats.contribution import CACHED, Contribution
from gradstats.errors import CoverageError
from gradstats.forms.convolution_weight import in_parts
from gradstats.forms.dense import Dense, PositionSum
from gradstats.forms.outer import Outer, OuterSum
from gradstats.forms.products import Products
from gradstats.forms.rows import Rows
from gradstats.forms.streamed import Groups, Streamed
from gradstats.joint import Total
from gradstats.rules.convolution import Convolution
from gradstats.rules.normalization import Summed
from gradstats.rules.registry import Rule
from gradstats.rules.transposed import TransposedConvolution
from gradstats.rules.unrolled import Uneven
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


def dense():
    c = randn(N, 4, 3)
    return Dense(c), c


def outer(positions):
    d, a = randn(N, positions, 4), randn(N, positions, 3)
    return d, a, torch.einsum("nto,nti->noi", d, a)


def outer_sum(kind):
    d, a, c = outer(5)
    return kind(d, a), c


def one_position():
    d, a, c = outer(1)
    return Outer(d[:, 0], a[:, 0]), c


def rows():
    ids, d = torch.randint(0, 7, (N, 3)), randn(N, 3, 4)
    return Rows(ids, d, 7), torch.einsum("ntr,nto->nro", nn.functional.one_hot(ids, 7).double(), d)


def position_sum():
    c = randn(N, 2, 3, 4)
    return PositionSum(c, 1), c.sum((1, 2))


def summed():
    form, c = position_sum()
    return Summed(c, lambda: form), c


def groups():
    form, c = dense()
    return Groups(form, 2), c.unflatten(0, (-1, 2)).sum(1)


def total():
    (one, c), (other, e) = dense(), outer_sum(OuterSum)
    return Total([one, other]), c + e


# By the names that operators know them by.
BY_NAME = {
    "Dense": dense,
    "PositionSum": position_sum,
    "Summed": summed,
    "Outer": one_position,
    "OuterSum": lambda: outer_sum(OuterSum),
    "Uneven": lambda: outer_sum(Uneven),
    "Rows": rows,
    "Products": FORMS["products"],
    "ConvolutionWeight": FORMS["transposed, padded"],
    "Groups": groups,
    "Total": total,
}
# Where they occur, a graph breaks.
EAGER = {"Groups", "Total"}


def test_every_form_is_tested():
    concrete = [name for name, kind in Contribution.FORMS.items() if not isabstract(kind)]
    assert {name for name in concrete if Contribution.FORMS[name].__module__.startswith("gradstats.")} == {*BY_NAME}


@pytest.mark.parametrize("name", BY_NAME)
def test_what_is_made_of_a_form(name):
    """Itself again, from its operands, and a part of its examples."""
    made, c = BY_NAME[name]()
    assert type(made) is Contribution.FORMS[name]
    index = torch.tensor([2, 0])
    forms = {made: c, made.subset(index): c[index]}
    if name in EAGER:
        with pytest.raises(CoverageError, match="torch.compile"):
            _ = made.operands
    else:
        tensors, integers = made.operands
        assert all(type(n) in (int, bool) for n in integers)
        again = type(made).of(list(tensors), [int(n) for n in integers])
        forms |= {again: c, again.subset(index): c[index]}
    with torch.no_grad():
        for form, expected in forms.items():
            assert (form.count, form.shape, form.dtype) == (len(expected), expected.shape[1:], c.dtype)
            same(torch.stack([form.example(n).clone() for n in range(form.count)]), expected)
            gradient, found = form.sums(["sum_of_squares", "squared_norms"])
            same(gradient, expected.sum(0))
            same(found["sum_of_squares"], expected.square().sum(0))
            same(found["squared_norms"], expected.square().flatten(1).sum(1))


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
    monkeypatch.setattr("gradstats.forms.convolution_weight.BLOCK", numbers)
    monkeypatch.setattr("gradstats.forms.convolution_weight.CACHED", 2 * numbers)
    made, c = FORMS[name]()
    names = ["sum_of_squares", "squared_norms"]
    ways = {"grouped": lambda: in_parts(made.grouped(), names, made), "examples": made.ways(names)["examples"]}
    if "groups" not in name:
        ways["unfolded"] = lambda: in_parts(made.unfolded(), names, made)
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
    monkeypatch.setattr("gradstats.forms.convolution_weight.BLOCK", 0)
    n, positions = 64, 8
    layer = nn.Conv1d(64, 128, 9, padding=4, bias=False)
    x, d, weight = torch.randn(n, 64, positions), torch.randn(n, 128, positions), layer.weight.detach()
    form = Convolution.backward(Convolution.options(layer), (x, weight), d, frozenset({"weight"}))[1]["weight"]
    names = ["sum_of_squares", "squared_norms"]
    ways = {"grouped": lambda: in_parts(form.grouped(), names, form)} | form.ways(names)
    if way == "examples":
        ways[way] = lambda: Streamed.direct(form, names)
    with LargestAllocation() as largest:
        ways[way]()
    assert largest.elements <= CACHED < n * 64 * 9 * positions < n * weight.numel()
