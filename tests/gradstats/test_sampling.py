"""Statistics of a random part of the examples."""

import copy
import itertools
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gradstats import GradstatsError, attach
from gradstats.sampling import Sampling
from tests import compiling, oracle
from tests.gradstats.test_turns import batch, network, step


@dataclass(frozen=True)
class Chosen(Sampling):
    """Draws what it is told to."""

    index: list[int] = field(default_factory=list)

    def draw(self, n):
        return torch.tensor(self.index)


def draws(stats, *index):
    """From here on the sums are over these examples."""
    stats.sampling = stats.lifetime.sampling = Chosen(fraction=0.5, index=list(index))


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        self.head.weight, self.inner = self.embedding.weight, nn.Linear(4, 4)

    def forward(self, ids):
        return self.head(self.inner(self.inner(self.embedding(ids)).tanh())).mean(1)


def convolution():
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.GroupNorm(3, 3), nn.Flatten(), nn.Linear(12, 3))


class Bilinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Bilinear(5, 5, 3)

    def forward(self, x):
        return self.inner(x, x.sin()).sum(1)


class First(nn.Module):
    def forward(self, outputs):
        return outputs[0].sum(1)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(4))

    def forward(self, x):
        return x * self.scale


class Fold(nn.Module):
    def forward(self, x):
        return x.flatten(0, 1)


class Unfold(nn.Module):
    def forward(self, x):
        return x.unflatten(0, (-1, 2)).flatten(1)


MODELS = {
    "linear": (network, lambda n: torch.randn(n, 5)),
    "positions": (
        lambda: nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Flatten(), nn.Linear(8, 3)),
        lambda n: torch.randn(n, 2, 5),
    ),
    "convolution": (convolution, lambda n: torch.randn(n, 2, 4, 4)),
    "bilinear": (Bilinear, lambda n: torch.randn(n, 2, 5)),
    "tied": (Head, lambda n: torch.randint(0, 5, (n, 3))),
    "recurrent": (lambda: nn.Sequential(nn.GRU(5, 3, batch_first=True), First()), lambda n: torch.randn(n, 3, 5)),
    "vmap": (lambda: nn.Sequential(nn.Linear(5, 4), Scaled(), nn.Linear(4, 3)), lambda n: torch.randn(n, 5)),
    "folded": (
        lambda: nn.Sequential(Fold(), nn.Linear(5, 4), Unfold(), nn.Linear(8, 3)),
        lambda n: torch.randn(n, 2, 5),
    ),
}


@pytest.mark.parametrize("statistics", [("second_moment",), ("second_moment", "abs_mean", "sign_mean")])
@pytest.mark.parametrize("name", MODELS)
def test_sums_are_over_the_examples_drawn_and_over_all_in_the_mean(name, statistics):
    make, draw = MODELS[name]
    model, n, m = make().double(), 4, 2
    x = draw(n)
    x, y = x.double() if x.is_floating_point() else x, torch.randint(0, 3, (n,))
    expected = oracle.contributions(model, F.cross_entropy, x, y)
    stats, subsets = attach(model, *statistics), list(itertools.combinations(range(n), m))
    total = {key: torch.zeros_like(c[0]) for key, c in expected.items()}
    for subset in subsets:
        draws(stats, *subset)
        model.zero_grad()
        step(model, x, y)
        for key, c in expected.items():
            g, rows = n * c, list(subset)
            torch.testing.assert_close(model.get_parameter(key).grad, c.sum(0))
            torch.testing.assert_close(stats.second_moment[key], g[rows].square().mean(0))
            if "abs_mean" in statistics:
                torch.testing.assert_close(stats.abs_mean[key], g[rows].abs().mean(0))
                certain = g.abs().amin(0) > 1e-9
                torch.testing.assert_close(stats.sign_mean[key][certain], g[rows].sign().mean(0)[certain])
            total[key] += stats.second_moment[key] / len(subsets)
    for key, c in expected.items():
        torch.testing.assert_close(total[key], oracle.second_moment(c), rtol=1e-12, atol=1e-15)


def test_variance_is_unbiased():
    """Over all subsets, in which some elements come out below zero."""
    model, (x, y) = network().double(), batch(4)
    x = x.double()
    expected = oracle.contributions(model, F.cross_entropy, x, y)
    stats, subsets = attach(model, "variance", fraction=0.5), list(itertools.combinations(range(4), 2))
    found: dict = {key: [] for key in expected}
    for subset in subsets:
        draws(stats, *subset)
        model.zero_grad()
        step(model, x, y)
        for key in expected:
            found[key].append(stats.variance[key])
    for key, c in expected.items():
        torch.testing.assert_close(torch.stack(found[key]).mean(0), oracle.variance(c), rtol=1e-10, atol=1e-15)
    assert min(float(torch.stack(values).min()) for values in found.values()) < -1e-6


@pytest.mark.parametrize("name", ["linear", "tied"])
def test_all_layers_see_the_same_examples(name):
    make, draw = MODELS[name]
    model, n = make().double(), 6
    x = draw(n)
    x, y = x.double() if x.is_floating_point() else x, torch.randint(0, 3, (n,))
    expected = oracle.contributions(model, F.cross_entropy, x, y)
    stats, seen = attach(model, fraction=0.5), set()
    for _ in range(4):
        model.zero_grad()
        step(model, x, y)
        fits = [
            rows
            for rows in itertools.combinations(range(n), 3)
            if all(
                torch.allclose(stats.second_moment[key], (n * c[list(rows)]).square().mean(0))
                for key, c in expected.items()
            )
        ]
        assert len(fits) == 1
        seen.update(fits)
        assert not stats.lifetime._drawn  # kept for a backward pass
    assert len(seen) > 1


def test_variance_of_the_estimate():
    """B^2 (1/m - 1/B) Var_b h(c_b), over all subsets."""
    h, n = torch.randn(5).double(), 5
    for m in range(1, n + 1):
        estimates = torch.stack([n / m * h[list(s)].sum() for s in itertools.combinations(range(n), m)])
        torch.testing.assert_close(estimates.var(unbiased=False), n**2 * (1 / m - 1 / n) * h.var())


def test_draws_are_reproducible_and_leave_the_global_random_numbers_alone():
    def run(generator=None, **options):
        torch.manual_seed(0)
        model, (x, y) = network(), batch(12)
        stats = attach(model, fraction=0.25, generator=generator, **options)
        found = []
        for _ in range(3):
            model.zero_grad()
            step(model, x, y)
            found.append(stats.second_moment["0.weight"])
        return torch.stack(found), torch.rand(3)

    first, after = run()
    again, _ = run()
    other, _ = run(torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    network(), batch(12)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(after, torch.rand(3))
    assert not torch.equal(first[0], first[1])  # another part of the same batch


def test_draws_continue_from_the_state_of_the_generator():
    generator = torch.Generator().manual_seed(3)
    sampling = Sampling(1, 0.25, generator)
    sampling.draw(12)
    state = generator.get_state()
    drawn = sampling.draw(12)
    generator.set_state(state)
    assert torch.equal(sampling.draw(12), drawn)


@pytest.mark.parametrize(("n", "m"), [(1, 1), (2, 1), (7, 2), (8, 2), (16, 4)])
def test_how_many_are_drawn(n, m):
    index = Sampling(1, 0.25, torch.Generator()).draw(n)
    assert len(index) == m == len(set(index.tolist())) and int(index.min()) >= 0 and int(index.max()) < n


def test_accumulation_with_a_short_last_step():
    model = network()
    x, y = batch(9)
    expected = oracle.contributions(model, F.cross_entropy, x, y)
    stats, total = attach(model, fraction=0.5), 0.0
    parts = {4: [(0, 1), (2, 3)], 1: [(0,)]}  # halves, so that both together are all
    for turn in range(2):
        model.zero_grad()
        for rows in (slice(0, 4), slice(4, 8), slice(8, 9)):
            n = len(y[rows])
            draws(stats, *parts[n][turn % len(parts[n])])
            (F.cross_entropy(model(x[rows]), y[rows]) * n / 9).backward()
        assert stats.batch_size == 9
        total += stats.second_moment["0.weight"] / 2
    torch.testing.assert_close(total, oracle.second_moment(expected["0.weight"]))


def test_one_and_all_change_no_bit():
    model, (x, y) = network().float(), batch()
    twin = copy.deepcopy(model)
    stats, sampled = attach(model, *oracle.STATISTICS), attach(twin, *oracle.STATISTICS, every=1, fraction=1.0)
    for m in (model, twin):
        step(m, x.float(), y)
    for name in oracle.STATISTICS:
        for a, b in zip(stats.read(name).values(), sampled.read(name).values(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["norms", "noise_scale", "gram", "histogram", "projection", "max_abs", "snr"])
def test_what_a_part_does_not_estimate_is_refused(name):
    with pytest.raises(GradstatsError, match=f"'{name}' is not a sum over examples"):
        attach(network(), name, fraction=0.5)
    attach(network(), name, every=2)


def test_refused_on_reading_too():
    model, (x, y) = network(), batch()
    stats = attach(model, fraction=0.5)
    step(model, x, y)
    assert stats.read("variance")["0.weight"].shape == model.get_parameter("0.weight").shape
    with pytest.raises(GradstatsError, match="'snr' is not a sum"):
        stats.snr["0.weight"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every=0"),
        ({"every": 2.0}, "every=2.0"),
        ({"fraction": 0.0}, "fraction=0.0"),
        ({"fraction": 1.5}, "fraction=1.5"),
        ({"every": True}, "every=True"),
        ({"fraction": True}, "fraction=True"),
        ({"fraction": 0.5, "granularity": "token"}, "draws examples"),
        ({"every": 2, "engine": "microbatch"}, "gathers all that it sees"),
        ({"generator": torch.Generator()}, "draws nothing"),
    ],
)
def test_refused(options, message):
    model = network()
    with pytest.raises(GradstatsError, match=message):
        attach(model, **options)
    attach(model)  # and left as it was


@compiling.marked
def test_a_part_of_the_examples_when_compiled():
    model, (x, y) = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 3)).double(), batch(4)
    expected = oracle.contributions(model, F.cross_entropy, x, y)
    stats, backend = attach(model, "second_moment", fraction=0.5), compiling.Counting()
    stats.probe(x)
    call = torch.compile(model, fullgraph=True, backend=backend)
    for rows in ([0, 1], [1, 3]):
        draws(stats, *rows)
        model.zero_grad()
        step(call, x, y)
        for key, c in expected.items():
            torch.testing.assert_close(model.get_parameter(key).grad, c.sum(0))
            torch.testing.assert_close(stats.second_moment[key], (4 * c[rows]).square().mean(0))
    assert backend.graphs == 1
