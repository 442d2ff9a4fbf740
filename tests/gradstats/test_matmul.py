"""Reduced precision is for statistics alone: the gradient is untouched, the error is what the dtype can do."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradstats
from gradstats import GradstatsError, VerificationError, choice, matmul
from gradstats.forms.outer import FEW, Outer, OuterSum
from gradstats.native import build
from tests import oracle

NAMES = ("second_moment", "variance", "norms", "abs_mean", "sign_mean", "gram")


@pytest.fixture
def instructions(monkeypatch):
    """The processor is said to have them. torch multiplies on any, with sums in float32; with them it is faster."""
    monkeypatch.setattr(matmul, "_cpu_multiplies_bfloat16", True)


@pytest.fixture
def problem():
    model = nn.Sequential(nn.Linear(40, 50), nn.ReLU(), nn.Linear(50, 10))
    return model, F.cross_entropy, torch.randn(64, 40), torch.randint(0, 10, (64,))


def backward(model, loss, x, y):
    loss(model(x), y).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.usefixtures("instructions")
def test_only_statistics_change(problem):
    model, loss, x, y = problem
    reduced, plain = copy.deepcopy(model), copy.deepcopy(model)
    exact_stats = gradstats.attach(model, *NAMES)
    stats = gradstats.attach(reduced, *NAMES, statistics_dtype=torch.bfloat16)
    expected, _ = backward(plain, loss, x, y), backward(model, loss, x, y)
    with choice.unmeasured():
        found = backward(reduced, loss, x, y)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    for name in ("second_moment", "variance", "abs_mean"):
        for parameter in ("0.weight", "2.weight"):
            value, expected = stats.read(name)[parameter], exact_stats.read(name)[parameter]
            assert value.dtype == torch.float32
            assert 1e-4 < relative(value, expected) < matmul.ROUNDING[torch.bfloat16], name
        assert torch.equal(stats.read(name)["0.bias"], exact_stats.read(name)["0.bias"])
    assert torch.equal(stats.norms["0.weight"], exact_stats.norms["0.weight"])  # no matmul
    for name in ("gram", "sign_mean"):  # terms that cancel
        assert torch.equal(stats.read(name)["0.weight"], exact_stats.read(name)["0.weight"])


@pytest.mark.usefixtures("instructions")
def test_verify_reports_the_error(problem):
    result = gradstats.verify(*problem, statistics_dtype=torch.bfloat16)
    assert 5e-4 < result.worst.error < result.tolerance < 1.2e-2 and result.worst.parameter.endswith("weight")
    assert gradstats.verify(*problem).worst.error < 1e-12
    with pytest.raises(VerificationError, match="second_moment|variance"):
        gradstats.verify(*problem, statistics_dtype=torch.bfloat16, tolerance=1e-4)


def test_norms_of_positions_that_cancel_are_exact():
    """Through Gram matrices, whose entries have both signs: rounded, nothing would be left of the sum."""
    d, a = torch.randn(5, 4, 200), torch.randn(5, 1, 200).expand(5, 4, 200)
    d = d - d.mean(1, keepdim=True) + torch.randn(5, 1, 200) / 30
    expected = (d.double().mT @ a.double()).square().sum((1, 2))
    contribution = OuterSum(d, a)
    contribution.statistics_dtype = torch.bfloat16
    assert relative(contribution.gram()[1]["squared_norms"], expected) < 1e-3


def test_signs_are_counted_exactly():
    """301 has more digits than bfloat16."""
    contribution = Outer(torch.ones(301, 2), torch.ones(301, 3))
    contribution.statistics_dtype = torch.bfloat16
    assert (contribution.closed(["sign_mean"])["sign_mean"] == 301).all()


# 1 + 2^-8 and a little more, which bfloat16 rounds to 1 + 2^-7.
ABOVE_HALF = 1 + 2.0**-8 + 2.0**-16


@pytest.mark.usefixtures("instructions")
def test_the_bound_of_a_sum_is_nearly_reached():
    """Both factors are rounded up by as much as can be, and so is the sum of 2025 such matmul."""
    d, a = (torch.full((2025, 1), ABOVE_HALF**0.5) for _ in range(2))
    contribution = Outer(d, a)
    contribution.statistics_dtype = torch.bfloat16
    found = contribution.closed(["sum_of_squares"])["sum_of_squares"]
    error = relative(found, d.double().square().T @ a.double().square())
    assert 0.95 * matmul.ROUNDING[torch.bfloat16] < error <= matmul.ROUNDING[torch.bfloat16]


@pytest.mark.usefixtures("instructions")
def test_verify_permits_what_a_variance_of_few_examples_may_be_off_by():
    """Two examples, opposite to each other: s2 = 2 q. Their products are rounded up three times, if not by the most."""
    d, a = (torch.tensor(1 + k * 2.0**-7 - 2.0**-8 + 2.0**-16, dtype=torch.float64).sqrt() for k in (8, 9))
    layer = nn.Linear(1, 1, bias=False)
    x, y = a * torch.tensor([[1.0], [-1.0]]), d * torch.ones(2, 1)
    result = gradstats.verify(
        layer, lambda output, y: (output * y).mean(), x, y, ["variance"], statistics_dtype=torch.bfloat16
    )
    assert 1.5 * matmul.ROUNDING[torch.bfloat16] < result.worst.error
    assert result.tolerance == pytest.approx(2 * matmul.ROUNDING[torch.bfloat16], rel=1e-4)


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("scale", [1e-17, 1e17])
def test_range_is_that_of_float32(scale):
    d, a = torch.randn(32, 8) * scale, torch.randn(32, 9) / 100
    contribution = Outer(d, a)
    contribution.statistics_dtype = torch.bfloat16
    expected = d.double().square().T @ a.double().square()
    assert relative(contribution.closed(["sum_of_squares"])["sum_of_squares"], expected) < 2.0**-7


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("scale", [1e-21, 1e21, 1e-37, 1e37])
def test_squares_that_float32_cannot_hold(scale):
    """Of either factor, where the products are of ordinary size."""
    d, a = (torch.randn(32, 8) + 3) * scale, (torch.randn(32, 9) + 3) / scale
    expected = (d.double().square().T @ a.double().square()).float()
    for left, right, q in ((d, a, expected), (a, d, expected.T)):
        contribution = Outer(left, right)
        contribution.statistics_dtype = torch.bfloat16
        found = contribution.closed(["sum_of_squares"])["sum_of_squares"]
        torch.testing.assert_close(found, q, rtol=matmul.ROUNDING[torch.bfloat16], atol=0)


@pytest.mark.parametrize("scale", [2.0**-140, 1e-30, 1.0, 1e30])
def test_matched_factors_have_the_same_products(scale):
    d, a = torch.randn(5, 3) * scale, torch.randn(5, 4)
    left, right = matmul.matched(d, a)
    assert torch.equal(left.unsqueeze(2) * right.unsqueeze(1), d.unsqueeze(2) * a.unsqueeze(1))
    assert 1 / 4 < left.abs().max() / right.abs().max() < 4


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize(("d", "a"), [((3, 2), (3, 4)), ((0, 2), (0, 4)), ((3, 0), (3, 4))])
def test_what_is_zero_or_empty_stays_so(d, a):
    contribution = Outer(torch.zeros(d), torch.ones(a))
    contribution.statistics_dtype = torch.bfloat16
    found = contribution.closed(["sum_of_squares"])["sum_of_squares"]
    assert torch.equal(found, torch.zeros(d[1], a[1]))


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_passes_through(value):
    d, a = torch.randn(4, 3), torch.rand(4, 5) + 1
    d[1, 2] = value
    contribution = Outer(d, a)
    contribution.statistics_dtype = torch.bfloat16
    found = contribution.closed(["sum_of_squares"])["sum_of_squares"]
    assert not found[2].isfinite().any() and found[:2].isfinite().all()


@pytest.mark.usefixtures("instructions")
@pytest.mark.slow
@pytest.mark.parametrize(
    "names", [("second_moment",), ("second_moment", "gram")], ids=["in the graph", "by an operator"]
)
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own
def test_compiled(problem, names):
    model, loss, x, y = problem
    c = oracle.contributions(model, loss, x, y)
    stats = gradstats.attach(model, *names, statistics_dtype=torch.bfloat16)
    stats.probe(x)
    with choice.unmeasured():
        loss(torch.compile(model, fullgraph=True)(x), y).backward()
    for name in ("0.weight", "2.weight"):
        error = relative(stats.second_moment[name], oracle.second_moment(c[name]))
        assert 1e-4 < error < matmul.ROUNDING[torch.bfloat16]


def test_a_device_without_instructions_is_exact(problem, monkeypatch):
    monkeypatch.setattr(matmul, "_cpu_multiplies_bfloat16", False)
    assert gradstats.verify(*problem, statistics_dtype=torch.bfloat16).worst.error < 1e-12


@pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("has", [False, True])
def test_forced_without_instructions(has, monkeypatch):
    """Where the exact way would be the faster one too: with as many numbers, a kernel is tried otherwise."""
    monkeypatch.setattr(matmul, "_cpu_multiplies_bfloat16", has)
    monkeypatch.setattr(choice, "_measured", lambda ways: [*ways][-1])
    monkeypatch.setattr(choice, "_chosen", {})
    contribution = Outer(torch.randn(128, 128), torch.randn(128, 128))
    contribution.statistics_dtype = torch.bfloat16
    assert contribution.count * contribution.shape[0] * contribution.shape[1] > FEW
    expected = contribution.d.double().square().T @ contribution.a.double().square()

    def error():
        return relative(contribution.sums(["sum_of_squares"])[1]["sum_of_squares"], expected)

    with matmul.forced():
        assert 1e-4 < error() < matmul.ROUNDING[torch.bfloat16]
    assert error() < 1e-6


@pytest.mark.parametrize("options", [{"statistics_dtype": torch.float16}, {"engine": "vmap"}, {"engine": "microbatch"}])
def test_refusals(problem, options):
    with pytest.raises(GradstatsError, match=r"reduced precision is torch.bfloat16"):
        gradstats.attach(problem[0], **{"statistics_dtype": torch.bfloat16} | options)
    gradstats.attach(problem[0]).detach()  # nothing is left behind


@pytest.mark.parametrize("way", ["blas", "onednn"])
@pytest.mark.parametrize("rows", [1, 64])
def test_every_library_multiplies(way, rows, monkeypatch):
    a, b = torch.randn(40, rows), torch.randn(rows, 50)
    monkeypatch.setattr(choice, "_measured", lambda ways: way)
    monkeypatch.setattr(choice, "_chosen", {})
    assert relative(matmul.product(a, b), a.double() @ b.double()) < 1e-6
    assert list(choice.choices().values()) == [way]
