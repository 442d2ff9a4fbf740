"""From contributions to numbers: the whole menu against its definitions on the oracle's contributions."""

import copy
import pickle
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import gradstats
from gradstats.errors import GradstatsError, LifetimeError, MissingStatistic
from gradstats.projection import Projection, salt_of, signs
from gradstats.statistics import STATISTICS, Variance, reference_weight
from gradstats.window import BlockStatistic, Window
from tests import oracle
from tests.layers import LAYERS, B


def flat(g):
    return g.reshape(len(g), -1)


def noise(g):
    """By deviations; |G|^2 as the mean of <g_a, g_b> over pairs a != b."""
    f, b = flat(g), len(g)
    pairs = (f @ f.T).sum() - f.square().sum()
    return torch.stack([pairs / (b * (b - 1)), (f - f.mean(0)).square().sum() / (b - 1)])


def projected(g, name):
    matrix = signs(salt_of(0, name), torch.arange(flat(g).shape[1]), 512).to(g.dtype)
    return flat(g) @ matrix / 512**0.5


def binned(g, scale):
    """Counts by |c| with edges at all powers of two."""
    edges = torch.tensor([2.0**-1000, *(2.0**e for e in range(-126, 129)), torch.inf], dtype=torch.float64)
    size = (g / scale).abs().flatten()
    return torch.stack([((size >= low) & (size < high)).sum() for low, high in pairwise(edges)])


# Of g (B, *shape), as a tensor.
DEFINITIONS = {
    "second_moment": lambda g: g.square().mean(0),
    "variance": lambda g: g.var(0),
    "norms": lambda g: flat(g).norm(dim=1),
    "sign_mean": lambda g: g.sign().mean(0),
    "abs_mean": lambda g: g.abs().mean(0),
    "max_abs": lambda g: g.abs().amax(0),
    "snr": lambda g: torch.where(g.mean(0) == 0, 0, g.mean(0).abs() / g.std(0)),
    "noise_scale": noise,
    "gram": lambda g: flat(g) @ flat(g).T,
    "cosine_similarity": lambda g: F.cosine_similarity(flat(g).unsqueeze(0), flat(g).unsqueeze(1), dim=2, eps=1e-300),
}
TOTALS = ("norms", "noise_scale", "gram", "cosine_similarity")
ALL = tuple(STATISTICS)


def tensor(value):
    return torch.stack(tuple(value)) if isinstance(value, tuple) else value


def close(found, expected):
    torch.testing.assert_close(tensor(found), expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max()))


def check(stats, contributions, scale):
    """Every statistic of every parameter, and of the whole gradient."""
    for name, c in contributions.items():
        g = c * scale
        for statistic, definition in DEFINITIONS.items():
            close(stats.read(statistic)[name], definition(g))
        close(stats.projection[name], projected(g, name))
        counts, edges, zeros = stats.histogram[name]
        torch.testing.assert_close(counts.long(), binned(g, scale))
        assert int(zeros) == int((g == 0).sum()) and edges[127] == scale
    whole = torch.cat([flat(c) * scale for c in contributions.values()], 1)
    for statistic in TOTALS:
        close(stats.read(statistic).total, DEFINITIONS[statistic](whole))
    close(stats.projection.total, sum(projected(c * scale, name) for name, c in contributions.items()))
    torch.testing.assert_close(stats.histogram.total.counts.long(), binned(whole, scale))


# A row for every form of contribution.
ROWS = (
    "linear",
    "linear, many positions",
    "embedding, padding",
    "layer norm, two dimensions",
    "group norm",
    "conv2d, groups",
    "conv2d, reflect",
    "without a rule",
)


def backpropagated(row, *statistics, loss_reduction="mean", **options):
    model, x = LAYERS[row].make().double(), oracle.to_double(LAYERS[row].x())
    weights = torch.rand(B, dtype=torch.float64) + 0.5
    contributions = oracle.contributions(model, oracle.coupled_loss, x, weights)
    stats = gradstats.attach(model, *statistics, loss_reduction=loss_reduction, **options)
    oracle.coupled_loss(model(x), weights).backward()
    return stats, contributions


@pytest.mark.parametrize("row", ROWS)
def test_the_menu_on_every_form(row):
    stats, contributions = backpropagated(row, *ALL)
    check(stats, contributions, B)


def test_a_sum_loss_and_the_engines():
    for options in ({"loss_reduction": "sum"}, {"engine": "vmap"}):
        stats, contributions = backpropagated("linear, few positions", *ALL, **options)
        check(stats, contributions, 1 if "loss_reduction" in options else B)


@pytest.mark.parametrize("loss_reduction", ["mean", "sum"])
def test_one_read_at_a_time(loss_reduction):
    """Sums that do not need tiles, without those that do."""
    for statistic in ("second_moment", "variance", "norms", "snr", "noise_scale"):
        stats, contributions = backpropagated("linear, few positions", statistic, loss_reduction=loss_reduction)
        for name, c in contributions.items():
            g = c * (B if loss_reduction == "mean" else 1)
            close(stats.read(statistic)[name], DEFINITIONS[statistic](g))


class FourthMoment(BlockStatistic):
    name, per = "fourth_moment", "element"

    def partial(self, block):
        return block.c.pow(4).sum(0)

    def read(self, window):
        return window.sums[self.key] * window.scale**4 / window.batch_size


class LargestElement(BlockStatistic):
    """max over the elements, an entry an example: merges over blocks and parameters by maximum."""

    name, per, merge = "largest_element", "example", torch.maximum

    def partial(self, block):
        return block.c.abs().amax(1)

    def read(self, window):
        return window.sums[self.key] * window.scale


def test_a_statistic_of_ones_own():
    stats, contributions = backpropagated("embedding, padding", FourthMoment, LargestElement())
    for name, c in contributions.items():
        close(stats.read("fourth_moment")[name], (c * B).pow(4).mean(0))
        close(stats.read(LargestElement)[name], flat(c * B).abs().amax(1))
    close(
        stats.read("largest_element").total, torch.cat([flat(c * B) for c in contributions.values()], 1).abs().amax(1)
    )


def test_refusals_name_the_way_out():
    with pytest.raises(GradstatsError, match=r"unknown statistic 'variances'; the menu is .*BlockStatistic"):
        gradstats.attach(nn.Linear(2, 2), "variances")

    class Other(FourthMoment):
        """Has the name of another."""

    with pytest.raises(GradstatsError, match="two statistics are called 'fourth_moment'"):
        backpropagated("linear", FourthMoment, Other)
    backpropagated("linear", FourthMoment)
    with pytest.raises(GradstatsError, match="is called 'fourth_moment', as is .*another name"):
        backpropagated("linear", Other)

    class Gram(BlockStatistic):
        """Not that of the menu, for which linear layers have a formula."""

        name, per = "gram", "batch"
        partial = read = None

    with pytest.raises(GradstatsError, match="is called 'gram', as is gradstats.statistics.Gram"):
        backpropagated("linear", Gram)
    with pytest.raises(GradstatsError, match="two statistics are called 'projection'"):
        backpropagated("linear", Projection(4), Projection(8))
    stats, _ = backpropagated("linear", "second_moment")
    with pytest.raises(MissingStatistic, match=r"attach\(model, 'gram'"):
        stats.gram["weight"]
    with pytest.raises(MissingStatistic, match="'fourth_moment' was not collected: give"):
        stats.read(FourthMoment)["weight"]
    with pytest.raises(GradstatsError, match="no total"):
        stats.second_moment.total  # noqa: B018
    with pytest.raises(GradstatsError, match="at least two"):
        backpropagated_alone("noise_scale").noise_scale.total  # noqa: B018


def backpropagated_alone(*statistics):
    model = nn.Linear(4, 3)
    stats = gradstats.attach(model, *statistics)
    model(torch.randn(1, 4)).sum().backward()
    return stats


def accumulated(*statistics):
    """Two backward passes, of 3 and 2 examples, with a mean over all five."""
    model, x = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double(), torch.randn(5, 4).double()
    contributions = oracle.contributions(model, lambda y, _: y.square().sum() / 5, x, None)
    stats = gradstats.attach(model, *statistics)
    for part in (x[:3], x[3:]):
        (model(part).square().sum() / 5).backward()
    return stats, contributions


def test_accumulation_steps():
    """Sums add, maxima merge, entries of examples are concatenated."""
    names = [name for name in ALL if name not in ("gram", "cosine_similarity")]
    stats, contributions = accumulated(*names)
    for name, c in contributions.items():
        for statistic in set(names) & set(DEFINITIONS):
            close(stats.read(statistic)[name], DEFINITIONS[statistic](c * 5))
        close(stats.projection[name], projected(c * 5, name))
        torch.testing.assert_close(stats.histogram[name].counts.long(), binned(c * 5, 5))


def test_the_functional_form_returns_all():
    model, x = nn.Linear(4, 3).double(), torch.randn(5, 4).double()
    loss = lambda y, _: y.square().mean()  # noqa: E731
    contributions = oracle.contributions(model, loss, x, None)
    result = gradstats.compute(model, loss, x, None, [*ALL, FourthMoment])
    whole = torch.cat([flat(c) * 5 for c in contributions.values()], 1)
    for statistic, definition in DEFINITIONS.items():
        close(result[statistic]["weight"], definition(contributions["weight"] * 5))
        assert (statistic in TOTALS) == (statistic in result.totals)
        if statistic in TOTALS:
            close(result.totals[statistic], definition(whole))
    close(result["fourth_moment"]["bias"], (contributions["bias"] * 5).pow(4).mean(0))
    pairs = gradstats.compute(model, loss, x[:4], None, ["norms"], granularity="microbatch", microbatch_size=2)
    assert pairs.batch_size == 4 and pairs.norms["weight"].shape == pairs.total_norms.shape == (2,)


def test_pairs_of_examples_that_never_met():
    stats, _ = accumulated("gram")
    with pytest.raises(LifetimeError, match="one backward pass.*zero_grad"):
        stats.gram["0.weight"]


def test_copies_and_pickles_know_their_statistics():
    model = nn.Linear(4, 3)
    gradstats.attach(model, FourthMoment, Projection(dimensions=8, seed=3))
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        stats = gradstats.attached(copied)
        copied(torch.ones(2, 4)).sum().backward()
        torch.testing.assert_close(stats.read("fourth_moment")["weight"], torch.full((3, 4), 16.0))
        assert stats.projection["weight"].shape == (2, 8)


def test_granularity_microbatch():
    stats, contributions = backpropagated("conv2d, reflect", *ALL, granularity="microbatch", microbatch_size=B)
    assert stats.window("0.weight", ("gram",)).batch_size == 1
    close(stats.norms.total, torch.cat([flat(c.sum(0, keepdim=True)) for c in contributions.values()], 1).norm(dim=1))
    with pytest.raises(GradstatsError, match="micro-batches of 2"):
        backpropagated("linear", "norms", granularity="microbatch", microbatch_size=2)


def test_granularity_token():
    """As if every position were an example of a batch of its own: exact where layers do not mix positions."""
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 3), nn.LayerNorm(3)).double()
    ids = torch.randint(0, 7, (3, 5))
    tokens = oracle.contributions(model, lambda y, _: y.sin().square().mean(), ids.flatten(), None)
    stats = gradstats.attach(model, *ALL, granularity="token")
    model(ids).sin().square().mean().backward()
    check(stats, tokens, 15)


# Numbers


def window(g):
    c = g / len(g)
    return Window({"sum_of_squares": c.square().sum(0)}, c.sum(0), len(g), "mean")


def test_variance_is_never_negative():
    """Equal gradients in float32: q - m^2 is rounding noise of either sign."""
    g = torch.rand(1, 1000).repeat(33, 1) * 100
    s2 = Variance().read(window(g))
    assert (s2 >= 0).all()
    assert (s2 <= 1e-5 * g[0].square()).all()


def v(g, r):
    """v_R of a batch g (B, ...)."""
    return torch.lerp(g.mean(0).square(), g.square().mean(0), reference_weight(len(g), r))


@given(b=st.integers(2, 40), r=st.floats(1, 40), seed=st.integers(0, 99))
def test_second_moment_at_a_reference_batch_size(b, r, seed):
    g = torch.randn(b, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.5
    torch.testing.assert_close(v(g, r), g.mean(0).square() + (1 / r - 1 / b) * g.var(0))
    torch.testing.assert_close(v(g, 1), g.square().mean(0))
    torch.testing.assert_close(v(g, b), g.mean(0).square())
    assert r > b or (v(g, r) > -1e-12).all()


def test_second_moment_at_a_reference_batch_size_is_unbiased():
    """E v_R = mu^2 + sigma^2/R over many batches, below, at and above B."""
    mu, sigma, b = 0.7, 1.5, 8
    g = mu + sigma * torch.randn(b, 400_000, dtype=torch.float64)
    for r in (1, 3, 8, 64, float("inf")):
        assert abs(v(g, r).mean() - (mu**2 + sigma**2 / r)) < 0.01
