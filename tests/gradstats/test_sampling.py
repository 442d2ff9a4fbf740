"""Statistics of every k-th window, and of a random part of the examples."""

import copy
import itertools
import pickle
import weakref
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from gradstats import GradstatsError, MissingStatistic, attach
from gradstats.rules import fallback
from gradstats.sampling import Sampling
from tests import oracle

B = 6


def network():
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def batch(n=B):
    return torch.randn(n, 5).double(), torch.randint(0, 3, (n,))


def step(model, x, y):
    F.cross_entropy(model(x), y).backward()


# Every k-th window


def zero_first(model, optimizer, x, y):
    model.zero_grad()
    step(model, x, y)
    optimizer.step()


def zero_between(model, optimizer, x, y):
    loss = F.cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def zero_last(model, optimizer, x, y):
    step(model, x, y)
    optimizer.step()
    model.zero_grad()


def zero_in_place(model, optimizer, x, y):
    optimizer.zero_grad(set_to_none=False)
    step(model, x, y)
    optimizer.step()


def without_optimizer(model, optimizer, x, y):
    step(model, x, y)
    model.zero_grad()


def evaluation_between(model, optimizer, x, y):
    step(model, x, y)
    model(x)
    optimizer.step()
    model.zero_grad()
    model(x)


@pytest.mark.parametrize(
    "loop", [zero_first, zero_between, zero_last, zero_in_place, without_optimizer, evaluation_between]
)
def test_every_kth_window_is_gathered(loop):
    model, (x, y) = network(), batch()
    stats = attach(model, *oracle.STATISTICS, every=3)
    assert not stats.gathered
    optimizer, found = torch.optim.SGD(model.parameters(), lr=0.1), []
    for _ in range(8):
        loop(model, optimizer, x, y)
        found.append(stats.gathered)
        assert stats.batch_size == B
    assert found == [True, False, False, True, False, False, True, False]


def test_gathered_windows_are_exact_and_others_are_plain():
    model, optimizers = network(), []
    twin = copy.deepcopy(model)
    stats = attach(model, *oracle.STATISTICS, every=2)
    for m in (model, twin):
        optimizers.append(torch.optim.SGD(m.parameters(), lr=0.1))
    for i in range(4):
        x, y = batch(B + i)
        before = copy.deepcopy(twin)
        model.load_state_dict(twin.state_dict())  # gradients are summed in another order where they are gathered
        for m, optimizer in zip((model, twin), optimizers, strict=True):
            optimizer.zero_grad()
            step(m, x, y)
        assert stats.batch_size == B + i
        if i % 2 == 0:
            assert oracle.exact(stats, oracle.contributions(before, F.cross_entropy, x, y))
        else:
            for p, q in zip(model.parameters(), twin.parameters(), strict=True):
                assert torch.equal(p.grad, q.grad)
            for entries in (stats.second_moment, stats.norms, stats.variance):
                with pytest.raises(MissingStatistic, match=r"one window in 2 \(every=2\). Ask stats.gathered"):
                    entries["0.weight"]
            with pytest.raises(MissingStatistic, match="stats.gathered"):
                stats.norms.total  # noqa: B018
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("zero", ["first", "between"])
def test_all_steps_of_a_window_are_alike(zero):
    model = network()
    stats = attach(model, *oracle.STATISTICS, every=2)
    optimizer, found = torch.optim.SGD(model.parameters(), lr=0.0), []
    for _ in range(5):
        x, y = batch()
        for i, rows in enumerate((slice(0, 1), slice(1, 3), slice(3, B))):
            if i == 0 and zero == "first":
                optimizer.zero_grad()
            loss = F.cross_entropy(model(x[rows]), y[rows]) * len(y[rows]) / B
            if i == 0:
                optimizer.zero_grad()
            loss.backward()
        assert stats.batch_size == B
        found.append(stats.gathered)
        if stats.gathered:
            assert oracle.exact(stats, oracle.contributions(network_of(model), F.cross_entropy, x, y))
        optimizer.step()
    assert found == [True, False, True, False, True]


def network_of(model):
    """A plain copy of an attached network."""
    plain = network()
    plain.load_state_dict(model.state_dict())
    return plain


def test_a_window_of_both_kinds_is_not_gathered():
    """The parameters are moved by hand between two windows, so that nothing tells the forward that one has ended."""
    model, (x, y) = network(), batch()
    stats = attach(model, every=2)
    step(model, x, y)
    model.zero_grad()
    step(model, x, y)  # the second window: plain
    loss = F.cross_entropy(model(x), y)  # which seems to go on
    model.zero_grad()
    loss.backward()
    assert not stats.gathered and stats.batch_size == B
    step(model, x, y)
    assert not stats.gathered and stats.batch_size == 2 * B


def test_ends_of_windows_that_nothing_tells_of_leave_no_model_without_statistics():
    model, (x, y) = network(), batch()
    stats = attach(model, every=3)
    found = []
    for _ in range(2):  # the second window is plain
        step(model, x, y)
        model.zero_grad()
    for _ in range(12):
        loss = F.cross_entropy(model(x), y)
        model.zero_grad()
        loss.backward()
        found.append(stats.gathered)
    assert any(found[-3:])


def test_gradients_of_some_parameters_are_kept():
    """A window is that of the parameters whose gradients are zeroed."""
    model, (x, y) = network(), batch()
    stats = attach(model, every=2)
    optimizer, found = torch.optim.SGD(model[0].parameters(), lr=0.1), []
    for _ in range(4):
        optimizer.zero_grad()
        step(model, x, y)
        optimizer.step()
        found.append(stats.accounts["0.weight"].gathered)
        assert not found[-1] or stats.second_moment["0.weight"].shape == (7, 5)
    assert found == [True, False, True, False]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_recomputation_decides_as_its_forward_did(reentrant, whole):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = network(), nn.Linear(3, 3).double()

        def forward(self, x):
            h = checkpoint(self.body, x, use_reentrant=reentrant)
            return checkpoint(self.head, h, use_reentrant=reentrant) if whole else self.head(h)

    model, (x, y) = Checkpointed(), batch()
    x.requires_grad_()  # reentrant checkpointing asks for it
    plain = copy.deepcopy(model)
    stats, found = attach(model, *oracle.STATISTICS, every=2), []
    for _ in range(4):
        loss = F.cross_entropy(model(x), y)
        model.zero_grad()
        loss.backward()
        torch.optim.SGD(model.parameters(), lr=0.0).step()
        found.append(stats.gathered)
        assert stats.batch_size == B
        assert not found[-1] or oracle.exact(stats, oracle.contributions(plain, F.cross_entropy, x, y))
    assert found == [True, False, True, False]


@pytest.mark.parametrize("reentrant", [False, True])
def test_steps_within_the_backward_pass(reentrant):
    """The optimizer steps as soon as a gradient is there, before earlier parts of the forward are recomputed."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(5, 5).double(), nn.Linear(5, 3).double()

        def forward(self, x):
            h = checkpoint(self.first, x, use_reentrant=reentrant)
            return checkpoint(self.second, h.tanh(), use_reentrant=reentrant)

    model, (x, y), found = Two(), batch(), []
    x.requires_grad_()
    stats = attach(model, every=2)
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}

    def take(p):
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(take)
    for _ in range(4):
        step(model, x, y)
        found.append(stats.gathered)
        assert stats.batch_size == B
    assert found == [True, False, True, False]


def test_a_plain_window_does_no_work_of_ours(monkeypatch):
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(5).double())

        def forward(self, x):
            return x * self.scale

    model, (x, y) = nn.Sequential(Bare(), network()), batch()
    stats = attach(model, every=2)
    step(model, x, y)
    model.zero_grad()

    def never(*args):
        raise AssertionError("the vmap leaf ran")

    monkeypatch.setattr(fallback, "run", never)
    output = model(x)
    assert type(output.grad_fn).__name__ == "AddmmBackward0"
    F.cross_entropy(output, y).backward()
    assert not stats.gathered
    assert all(s.grad is None for account in stats.accounts.values() for s in account.shadows.values())


def test_autograd_grad_leaves_no_trace_in_a_plain_window():
    model, (x, y) = network(), batch()
    stats = attach(model, every=2)
    step(model, x, y)
    model.zero_grad()
    torch.autograd.grad(F.cross_entropy(model(x[:2]), y[:2]), list(model.parameters()))
    assert stats.gathered and stats.batch_size == B
    step(model, x, y)
    assert not stats.gathered and stats.batch_size == B


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_begins_with_a_gathered_window(copied):
    model, (x, y) = network(), batch()
    stats = attach(model, every=2, fraction=0.5)
    zero_last(model, torch.optim.SGD(model.parameters(), lr=0.1), x, y)
    other = copied(model)
    step(other, x, y)
    handle = other[0].__dict__["_gradstats_leaf"].handle
    assert handle.gathered and handle.sampling.every == 2 and handle.sampling.fraction == 0.5
    step(model, x, y)
    assert not stats.gathered


def test_clipping_in_a_plain_window():
    model, (x, y) = network(), batch()
    stats = attach(model, "variance", every=2, follow_clipping=True)
    for i in range(4):
        model.zero_grad()
        step(model, x, y)
        stats.clip_grad_norm_(1e-3)
        assert stats.gathered == (i % 2 == 0)
        norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
        torch.testing.assert_close(norm, torch.tensor(1e-3).double(), rtol=1e-2, atol=0)


def test_zero_begins_with_a_gathered_window():
    model, (x, y) = network(), batch()
    stats = attach(model, every=3)
    zero_last(model, torch.optim.SGD(model.parameters(), lr=0.1), x, y)
    stats.zero()
    assert not stats.gathered
    step(model, x, y)
    assert stats.gathered


# A part of the examples


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


def test_both_together():
    model, optimizer, found = network(), None, []
    stats = attach(model, every=2, fraction=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(4):
        zero_first(model, optimizer, *batch())
        found.append(stats.gathered)
    assert found == [True, False, True, False]


# Under torch.compile


@pytest.fixture
def compiled():
    """A compiled model, its handle, and how many graphs were compiled."""
    torch._dynamo.reset()

    def compile_attached(model, x, **options):
        graphs = []

        def backend(graph, inputs):
            graphs.append(graph)
            return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

        stats = attach(model, *oracle.STATISTICS[: 2 if "fraction" in options else 3], **options)
        stats.probe(x)
        return torch.compile(model, fullgraph=True, backend=backend), stats, graphs

    yield compile_attached
    torch._dynamo.reset()


COMPILED = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
]


def marked(test):
    for mark in COMPILED:
        test = mark(test)
    return test


@marked
@pytest.mark.parametrize("loop", [zero_first, zero_between, zero_last])
def test_two_graphs_are_compiled(compiled, loop):
    model, (x, y) = network(), batch()
    twin = copy.deepcopy(model)
    call, stats, graphs = compiled(model, x, every=3)
    optimizers, found = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, twin)], []
    for _ in range(7):
        before = copy.deepcopy(twin)
        loop(call, optimizers[0], x, y)
        loop(twin, optimizers[1], x, y)
        found.append(stats.gathered)
        assert stats.batch_size == B
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q)
        if stats.gathered:
            c = oracle.contributions(before, F.cross_entropy, x, y)
            torch.testing.assert_close(stats.second_moment["0.weight"], oracle.second_moment(c["0.weight"]))
            torch.testing.assert_close(stats.norms["2.bias"], oracle.norms(c["2.bias"]))
        else:
            with pytest.raises(MissingStatistic, match="stats.gathered"):
                stats.second_moment["0.weight"]
    assert found == [True, False, False, True, False, False, True]
    assert len(graphs) == 2


@marked
def test_accumulation_when_compiled(compiled):
    model, found = network(), []
    call, stats, graphs = compiled(model, batch(2)[0], every=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        for _ in range(3):
            step(call, *batch(2))
        assert stats.batch_size == 6
        found.append(stats.gathered)
        optimizer.step()
    assert found == [True, False, True, False] and len(graphs) == 2


@marked
def test_a_part_of_the_examples_when_compiled(compiled):
    model, (x, y) = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 3)).double(), batch(4)
    expected = oracle.contributions(model, F.cross_entropy, x, y)
    call, stats, graphs = compiled(model, x, fraction=0.5)
    for rows in ([0, 1], [1, 3]):
        draws(stats, *rows)
        model.zero_grad()
        step(call, x, y)
        for key, c in expected.items():
            torch.testing.assert_close(model.get_parameter(key).grad, c.sum(0))
            torch.testing.assert_close(stats.second_moment[key], (4 * c[rows]).square().mean(0))
    assert len(graphs) == 1


def test_memory_of_sums_is_kept_for_the_next_window_that_is_gathered():
    """Through those that are not, since the system gives it again page by page; it is gone before new sums are."""
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    stats, x = attach(model, "second_moment", every=3), torch.randn(4, 6)
    sums = []
    for _ in range(5):
        model.zero_grad()
        model(x).sum().backward()
        if stats.gathered:
            sums.append(weakref.ref(stats.window("0.weight", ["sum_of_squares"]).sums["sum_of_squares"]))
        assert sums[-1]() is not None
    assert len(sums) == 2 and sums[0]() is None
