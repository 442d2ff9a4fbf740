"""Every form against the stack of contributions that it stands for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gradstats.contribution import BLOCK, Contribution
from gradstats.errors import CoverageError
from gradstats.forms.dense import Dense, PositionSum
from gradstats.forms.outer import Outer, OuterSum
from gradstats.forms.rows import Rows
from gradstats.forms.streamed import Groups, Streamed
from gradstats.native.build import compiler
from gradstats.rules.convolution import Convolution
from gradstats.statistics import STATISTICS
from gradstats.sums import SUMS, RawSum, register
from tests.allocations import LargestAllocation

SIZE = st.integers(1, 6)
BOTH = ("sum_of_squares", "squared_norms")


class Medians(RawSum):
    """Needs all examples of an element at once, and the elements to which none contributes."""

    name = "medians"
    per = "element"

    def partial(self, block):
        return (block.c + 1).median(0).values


class Places(RawSum):
    """Needs to know which elements it sees."""

    name = "places"
    per = "example"
    ignores_zeros = True

    def partial(self, block):
        return block.c @ block.elements.to(block.c.dtype)


for raw in (Medians(), Places(), *(raw for kind in STATISTICS.values() for raw in kind().needs)):
    register(raw)

DEFINITIONS = {
    "sum_of_squares": lambda c: c.square().sum(0),
    "squared_norms": lambda c: c.reshape(len(c), -1).square().sum(1),
    "sign_mean": lambda c: c.sign().sum(0),
    "abs_mean": lambda c: c.abs().sum(0),
    "max_abs": lambda c: c.abs().amax(0),
    "gram": lambda c: c.reshape(len(c), -1) @ c.reshape(len(c), -1).T,
    "medians": lambda c: (c + 1).median(0).values,
    "places": lambda c: c.reshape(len(c), -1) @ torch.arange(c[0].numel(), dtype=c.dtype),
}


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


def convolution(groups):
    module = nn.Conv2d(4, 6, 3, groups=groups, padding=1, padding_mode="circular").double()
    weight, bias = module.weight.detach(), module.bias.detach()
    x, d = randn(5, 4, 6, 5), randn(5, 6, 6, 5)
    options = Convolution.options(module)
    _, saved = Convolution.forward(options, x, {"weight": weight, "bias": bias})
    form = Convolution.backward(options, saved, d, frozenset({"weight"}))[1]["weight"]
    grad = lambda n: torch.autograd.grad(module(x[n : n + 1]), module.weight, d[n : n + 1])[0]  # noqa: E731
    return form, torch.stack([grad(n) for n in range(5)])


def outer_sum():
    d, a = randn(5, 4, 6), randn(5, 4, 3)
    return OuterSum(d, a), torch.einsum("nto,nti->noi", d, a)


def rows():
    """Repeated ids within an example and between them; rows that nobody touches."""
    ids, d = torch.tensor([[1, 1, 4], [2, 4, 4], [1, 6, 2], [6, 6, 6], [1, 2, 4]]), randn(5, 3, 4)
    return Rows(ids, d, 8), torch.einsum("ntr,nto->nro", nn.functional.one_hot(ids, 8).double(), d)


def outer():
    d, a = randn(5, 6), randn(5, 3)
    return Outer(d, a), torch.einsum("no,ni->noi", d, a)


def dense(*shape):
    c = randn(5, *shape)
    return Dense(c), c


def position_sum():
    c = randn(5, 2, 3, 4)
    return PositionSum(c, 1), c.sum((1, 2))


def groups():
    _, c = outer_sum()
    return Groups(Dense(c[:4]), 2), c[:4].unflatten(0, (2, 2)).sum(1)


FORMS = {
    "dense": lambda: dense(4, 3, 2),
    "dense vector": lambda: dense(7),
    "dense scalar": lambda: dense(),
    "position sum": position_sum,
    "outer": outer,
    "outer sum": outer_sum,
    "rows": rows,
    "convolution": lambda: convolution(1),
    "grouped convolution": lambda: convolution(2),
    "groups": groups,
}


@pytest.mark.parametrize("limit", [1, 17, 40, BLOCK])
@pytest.mark.parametrize("form", FORMS)
def test_every_sum_of_every_form(form, limit, monkeypatch):
    for kind in (Contribution, Rows):
        monkeypatch.setattr(kind.blocks, "__defaults__", (limit, True))
    found, c = FORMS[form]()
    assert (found.count, found.shape) == (len(c), tuple(c.shape[1:]))
    gradient, sums = found.sums(tuple(DEFINITIONS))
    torch.testing.assert_close(gradient, c.sum(0), rtol=1e-10, atol=1e-12)
    for name, definition in DEFINITIONS.items():
        torch.testing.assert_close(sums[name], definition(c), rtol=1e-10, atol=1e-12)
    for n in range(len(c)):
        torch.testing.assert_close(found.example(n), c[n])


@given(n=SIZE, t=st.integers(1, 20), i=SIZE, o=SIZE, seed=st.integers(0, 99))
@settings(deadline=None)
def test_the_fast_ways(n, t, i, o, seed):
    """Both sums, and each alone (norms alone take another path)."""
    torch.manual_seed(seed)
    d, a, ids = randn(n, t, o), randn(n, t, i), torch.randint(0, i, (n, t))
    one_hot = torch.nn.functional.one_hot(ids, i).double()
    for form, c in (
        (OuterSum(d, a), torch.einsum("nto,nti->noi", d, a)),
        (Outer(d[:, 0], a[:, 0]), torch.einsum("no,ni->noi", d[:, 0], a[:, 0])),
        (Dense(d), d),
        (Rows(ids, d, i), torch.einsum("ntr,nto->nro", one_hot, d)),
    ):
        torch.testing.assert_close(form.gradient(), c.sum(0))
        for names in (BOTH, BOTH[:1], BOTH[1:]):
            gradient, found = form.sums(names)
            torch.testing.assert_close(gradient, c.sum(0))
            assert set(found) == set(names)
            for name in names:
                torch.testing.assert_close(found[name], DEFINITIONS[name](c))


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("sizes", [(5, 2, 6, 3), (3, 40, 6, 4), (2, 40, 300, 500)])
@pytest.mark.parametrize("names", [BOTH, BOTH[:1], BOTH[1:]])
def test_every_way_to_a_sum_over_positions(names, sizes, compiled, monkeypatch):
    if compiled and compiler() is None:
        pytest.skip("no C++ compiler")
    if not compiled:
        monkeypatch.setattr("gradstats.native.library", lambda name: None)
    n, t, o, i = sizes
    d, a = randn(n, t, o), randn(n, t, i)
    c = torch.einsum("nto,nti->noi", d, a)
    ways = OuterSum(d, a).ways(names)
    expected = {"native": compiled, "gram": names == BOTH[1:] and (t == 2 or o == 300), "stream": t == 40}
    if not compiled and not expected["gram"]:
        expected |= {"blocks": o < 300, "stream": o == 300}
    assert list(ways) == [name for name in ("native", "gram", "blocks", "stream") if expected.get(name)]
    for way in ways.values():
        gradient, found = way()
        torch.testing.assert_close(gradient, c.sum(0))
        assert set(found) == set(names)
        for name in names:
            torch.testing.assert_close(found[name], DEFINITIONS[name](c))


@pytest.mark.parametrize("names", [BOTH, BOTH[:1], BOTH[1:], (*BOTH, "max_abs")])
def test_one_position_with_and_without_the_kernel(names, monkeypatch):
    form, c = outer()
    for enabled in (True, False):
        monkeypatch.setattr("gradstats.native.enabled", enabled)
        gradient, found = form.sums(names)
        torch.testing.assert_close(gradient, c.sum(0))
        assert set(found) == set(names)
        for name in names:
            torch.testing.assert_close(found[name], DEFINITIONS[name](c))


def test_a_large_parameter_is_streamed_in_parts(monkeypatch):
    """The buffer for one example's contribution is no larger than a block."""
    monkeypatch.setattr("gradstats.forms.outer.BLOCK", 10)
    form, c = outer_sum()
    gradient, found = Streamed.direct(form, BOTH)
    torch.testing.assert_close(gradient, c.sum(0))
    for name in BOTH:
        torch.testing.assert_close(found[name], DEFINITIONS[name](c))
    assert [part.shape for _, part in form.parts()] == [(3, 3), (3, 3)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_squares_of_low_precision_are_float32(dtype):
    """300^2 overflows float16."""
    d, a = torch.full((2, 3, 4), 300.0, dtype=dtype), torch.ones(2, 3, 5, dtype=dtype)
    for form in (Dense(d), Outer(d[:, 0], a[:, 0]), OuterSum(d, a), Rows(torch.zeros(2, 3, dtype=torch.long), d, 5)):
        for names in (BOTH, (*BOTH, "gram")):
            gradient, found = form.sums(names)
            assert gradient.dtype == dtype
            for value in found.values():
                assert value.dtype == torch.float32 and value.isfinite().all()


@pytest.mark.parametrize("compiled", [True, False])
def test_norms_alone_never_form_an_example_gradient(compiled, monkeypatch):
    """Few positions go through Gram matrices, where the kernel does not keep it in registers."""
    form = OuterSum(torch.randn(3, 4, 64), torch.randn(3, 4, 64))
    if not compiled:
        monkeypatch.setattr("gradstats.native.library", lambda name: None)
    monkeypatch.setattr(OuterSum, "example", lambda self, n: pytest.fail("formed an example's gradient"))
    assert form.sums(("squared_norms",))[1]["squared_norms"].shape == (3,)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("limit", [1, 7, 30, 1000])
def test_blocks_cover_every_element_once_within_the_limit(form, limit):
    found, c = FORMS[form]()
    flat = c.reshape(len(c), -1)
    seen = torch.zeros(flat.shape[1])
    for block in found.blocks(limit):
        assert block.c.shape == (len(c), len(block.elements)) and block.c.numel() <= max(limit, len(c))
        torch.testing.assert_close(block.c, flat[:, block.elements])
        seen[block.elements] += 1
    assert (seen == 1).all()


def test_blocks_of_rows_leave_out_what_nobody_touched():
    found, c = rows()
    elements = torch.cat([block.elements for block in found.blocks(20, zeros=False)])
    assert sorted(elements.tolist()) == c.abs().sum(0).flatten().nonzero().flatten().tolist()


@pytest.mark.parametrize("names", [tuple(SUMS), BOTH])
def test_no_stack_of_contributions_in_memory(names):
    """64 examples of 65,536 elements would be 4 blocks."""
    d, a = torch.randn(64, 2, 256), torch.randn(64, 2, 256)
    conv = nn.Conv2d(64, 64, 4)
    options = Convolution.options(conv)
    x = torch.randn(64, 64, 4, 4)
    saved = Convolution.forward(options, x, {"weight": conv.weight.detach(), "bias": None})[1]
    stack = 64 * 256 * 256
    for form in (
        OuterSum(d, a),
        Outer(d[:, 0], a[:, 0]),
        Rows(torch.arange(128).reshape(64, 2), torch.randn(64, 2, 512), 128),
        Convolution.backward(options, saved, torch.randn(64, 64, 1, 1), frozenset({"weight"}))[1]["weight"],
    ):
        assert form.count * torch.Size(form.shape).numel() == stack
        form.parameter = "weight"
        with LargestAllocation() as largest:
            form.sums(names)
        assert 0 < largest.elements <= BLOCK < stack


def test_tokens_are_positions():
    d, a, ids = randn(5, 4, 6), randn(5, 4, 3), torch.randint(0, 6, (5, 4))
    positions = torch.einsum("nto,nti->ntoi", d, a).flatten(0, 1)
    one_hot = nn.functional.one_hot(ids, 6).double()
    for form, c in (
        (OuterSum(d, a), positions),
        (Outer(d[:, 0], a[:, 0]), positions[::4]),
        (Rows(ids, d, 6), torch.einsum("ntr,nto->ntro", one_hot, d).flatten(0, 1)),
        (PositionSum(d, 1), d.flatten(0, 1)),
        (PositionSum(d[:, 0], 1), d[:, 0]),
    ):
        form.parameter = "weight"
        tokens = form.regroup("token")
        assert (tokens.count, tokens.parameter) == (len(c), "weight")
        for names in (BOTH, ("sign_mean", "gram")):
            gradient, found = tokens.sums(names)
            torch.testing.assert_close(gradient, form.gradient())
            for name in names:
                torch.testing.assert_close(found[name], DEFINITIONS[name](c))


@pytest.mark.parametrize("form", [convolution(1)[0], dense(3)[0]])
def test_positions_that_cannot_be_told_apart_are_refused(form):
    form.parameter = "body.weight"
    with pytest.raises(CoverageError, match=r"'body.weight' \([\d, ]+\).*granularity='example'"):
        form.regroup("token")


@pytest.mark.parametrize("form", [name for name in FORMS if name != "groups"])
def test_microbatches_are_sums_of_consecutive_examples(form):
    found, c = FORMS[form]()
    with pytest.raises(CoverageError, match="5 examples are not a whole number of micro-batches of 2"):
        found.regroup("microbatch", 2)
    assert found.regroup("example") is found
    for size, expected in ((1, c), (5, c.sum(0, keepdim=True))):
        merged = found.regroup("microbatch", size)
        assert merged.count == len(expected)
        for names in (BOTH, tuple(DEFINITIONS)):
            gradient, sums = merged.sums(names)
            torch.testing.assert_close(gradient, c.sum(0))
            for name in names:
                torch.testing.assert_close(sums[name], DEFINITIONS[name](expected))


def test_microbatches_of_a_stream():
    d, a = randn(6, 4, 6), randn(6, 4, 3)
    c = torch.einsum("nto,nti->noi", d, a).unflatten(0, (3, 2)).sum(1)
    for form in (OuterSum(d, a).regroup("microbatch", 2), Groups(OuterSum(d, a), 2)):
        assert isinstance(form, Streamed)
        gradient, found = form.sums(BOTH)
        torch.testing.assert_close(gradient, c.sum(0))
        for name in BOTH:
            torch.testing.assert_close(found[name], DEFINITIONS[name](c))
