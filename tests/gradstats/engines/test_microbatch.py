"""Micro-batches: exact as single examples, right in expectation, refused where they cannot tell."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from gradstats import BlockStatistic, CoverageError, GradstatsError, LifetimeError, MissingStatistic, attach, attached
from gradstats.optim import BatchInvariantAdam
from gradstats.statistics import STATISTICS
from tests import oracle

B = 12
ESTIMATED = ("second_moment", "variance", "noise_scale")
PAIRS = ("gram", "cosine_similarity")


def problem():
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    return model, torch.randn(B, 5).double(), torch.randint(0, 3, (B,))


def backpropagate(model, x, y, size, loss_reduction="mean"):
    """All examples, `size` at a time."""
    for start in range(0, len(x), size):
        rows = slice(start, start + size)
        loss = F.cross_entropy(model(x[rows]), y[rows], reduction="sum")
        (loss / len(x) if loss_reduction == "mean" else loss).backward()


def close(found, expected, **tolerance):
    found, expected = (torch.stack(v) if isinstance(v, tuple) else v for v in (found, expected))
    torch.testing.assert_close(found, expected, **{"rtol": 1e-10, "atol": 1e-12} | tolerance)


def by_definition(h, b):
    """q, s2 from the mean gradients h (M, *shape) of micro-batches of b examples."""
    big, m = b * len(h), h.mean(0)
    s2 = (h.square().mean(0) - m.square()) / (1 / b - 1 / big)
    return m.square() + s2 * (big - 1) / big, s2


# Numbers


def test_single_examples_are_exact():
    model, x, y = problem()
    expected = oracle.contributions(model, F.cross_entropy, x, y)
    stats = attach(model, *ESTIMATED, engine="microbatch")
    backpropagate(model, x, y, 1)
    assert (stats.batch_size, stats.microbatch_size) == (B, 1)
    for name, c in expected.items():
        close(stats.second_moment[name], oracle.second_moment(c))
        close(stats.variance[name], oracle.variance(c))
    flat = torch.cat([(c * B).flatten(1) for c in expected.values()], 1)
    trace = flat.var(0).sum()
    close(stats.noise_scale.total, (flat.mean(0).square().sum() - trace / B, trace))


@pytest.mark.parametrize("loss_reduction", ["mean", "sum"])
@pytest.mark.parametrize("size", [2, 4])
def test_estimates_from_larger_micro_batches(size, loss_reduction):
    model, x, y = problem()
    expected = oracle.contributions(model, F.cross_entropy, x, y)
    stats = attach(model, *ESTIMATED, engine="microbatch", loss_reduction=loss_reduction)
    backpropagate(model, x, y, size, loss_reduction)
    assert (stats.batch_size, stats.microbatch_size) == (B, size)
    traces = 0
    for name, c in expected.items():
        q, s2 = by_definition((c * B).unflatten(0, (-1, size)).mean(1), size)
        close(stats.second_moment[name], q)
        close(stats.variance[name], s2)
        traces += s2.sum()
    close(stats.noise_scale.total.trace, traces)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("statistic", ["second_moment", "variance"])
def test_one_statistic_is_that_of_many(statistic, size):
    """Squares alone are added in place."""
    model, x, y = problem()
    found = []
    for names in ((statistic,), ESTIMATED):
        model.zero_grad()
        with attach(model, *names, engine="microbatch") as stats:
            backpropagate(model, x, y, size)
            found.append(dict(stats.read(statistic)))
    for name, expected in found[1].items():
        close(found[0][name], expected)


class Shift(nn.Module):
    """Its parameters' gradients are one tensor."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.randn(3, dtype=torch.float64)) for _ in range(2))

    def forward(self, x):
        return x * (self.a + self.b)


@pytest.mark.parametrize("size", [1, 2])
def test_parameters_that_share_a_gradient(size):
    model, x = Shift(), torch.randn(6, 3, dtype=torch.float64)
    stats = attach(model, "variance", engine="microbatch")
    for part in x.split(size):
        (model(part).sum(1).mean() * size / len(x)).backward()
    _, expected = by_definition(x.unflatten(0, (-1, size)).mean(1), size)
    for name in ("a", "b"):
        close(stats.variance[name], expected)


@pytest.mark.parametrize("loss_reduction", ["mean", "sum"])
def test_granularity_microbatch_is_that_of_the_fused_engine(loss_reduction):
    """Three at a time here, all at once there."""
    model, x, y = problem()
    menu = [name for name in STATISTICS if name not in PAIRS]
    options = {"loss_reduction": loss_reduction, "granularity": "microbatch", "microbatch_size": 3}
    found = {}
    for engine, size in (("fused", B), ("microbatch", 3)):
        model.zero_grad()
        with attach(model, *menu, engine=engine, **options) as stats:
            backpropagate(model, x, y, size, loss_reduction)
            assert stats.batch_size == B
            found[engine] = {
                (statistic, name): stats.read(statistic)[name]
                for statistic in menu
                for name, _ in model.named_parameters()
            }
            found[engine] |= {(s, "total"): stats.read(s).total for s in menu if stats.read(s).has_total}
    for key, expected in found["fused"].items():
        if key[0] == "histogram":
            assert torch.equal(found["microbatch"][key].counts, expected.counts)
        else:
            close(found["microbatch"][key], expected)


class Models:
    """What the fused engine refuses, or has no rule for."""

    @staticmethod
    def batch_norm():
        return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 3)), torch.randn(B, 5)

    @staticmethod
    def sparse():
        return nn.Sequential(nn.Embedding(9, 3, sparse=True), nn.Flatten(), nn.Linear(6, 3)), torch.randint(
            0, 9, (B, 2)
        )

    @staticmethod
    def mixes_rows():
        class Mixes(nn.Linear):
            def forward(self, x):
                return super().forward(x - x.mean(0)).roll(1, 0) * self.weight.sum()

        return Mixes(5, 3), torch.randn(B, 5)

    @staticmethod
    def recomputed():
        """Reentrant checkpoints: one layer accumulates several times in one backward pass."""

        class Recomputed(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner, self.head = nn.Linear(5, 5), nn.Linear(5, 3)

            def forward(self, x):
                h = self.inner(x).tanh()
                for _ in range(2):
                    h = checkpoint(lambda h: self.inner(h).tanh(), h, use_reentrant=True)
                return checkpoint(self.head, h, use_reentrant=True)

        return Recomputed(), torch.randn(B, 5)

    @staticmethod
    def recomputed_whole():
        class Whole(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))

            def forward(self, x):
                return checkpoint(self.inner, x.requires_grad_(), use_reentrant=True)

        return Whole(), torch.randn(B, 5)

    @staticmethod
    def dictionary():
        class Returns(nn.Linear):
            def forward(self, x=None):
                return {"logits": [super().forward(x)], "hidden": x}

        return Returns(5, 3), torch.randn(B, 5)


MODELS = [name for name in vars(Models) if not name.startswith("_")]


@pytest.mark.parametrize("name", MODELS)
def test_any_model(name):
    model, x = getattr(Models, name)()
    model, x = model.double(), x.double() if x.is_floating_point() else x
    attached_to = model.inner if name == "recomputed_whole" else model
    prefix, y = "inner." * (attached_to is not model), torch.randint(0, 3, (B,))

    def loss_of(rows):
        output = model(x=x[rows])["logits"][0] if name == "dictionary" else model(x[rows])
        return F.cross_entropy(output, y[rows]) / 3

    parts, gradients = [slice(0, 4), slice(4, 8), slice(8, 12)], []
    for rows in parts:
        model.zero_grad()
        loss_of(rows).backward()
        gradients.append({n: p.grad.to_dense() for n, p in model.named_parameters()})
    model.zero_grad()
    stats = attach(attached_to, "second_moment", "variance", engine="microbatch")
    for rows in parts:
        loss_of(rows).backward()
    assert stats.batch_size == B
    for n, _ in attached_to.named_parameters():
        q, s2 = by_definition(torch.stack([g[prefix + n] * 3 for g in gradients]), 4)
        close(stats.second_moment[n], q)
        close(stats.variance[n], s2)


def test_optimizer_at_single_examples_takes_fused_steps():
    found = []
    for engine, size in (("fused", B), ("microbatch", 1)):
        torch.manual_seed(0)
        model, x, y = problem()
        attach(model, engine=engine)
        optimizer = BatchInvariantAdam(model.parameters(), lr=0.01, batch_size=64, reference_batch_size=4)
        for _ in range(3):
            optimizer.zero_grad()
            backpropagate(model, x, y, size)
            optimizer.step()
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    close(found[1], found[0])


# Lifetime


@pytest.fixture
def setting():
    model, x, y = problem()
    expected = oracle.contributions(model, F.cross_entropy, x, y)
    return model, x, y, expected, attach(model, "second_moment", "variance", engine="microbatch")


def exact(stats, expected):
    for name, c in expected.items():
        q, s2 = by_definition((c * B).unflatten(0, (-1, 4)).mean(1), 4)
        close(stats.second_moment[name], q)
        close(stats.variance[name], s2)
    return stats.batch_size == B


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zeroed_gradients_start_afresh(setting, set_to_none):
    model, x, y, expected, stats = setting
    for _ in range(3):
        backpropagate(model, -x[:4], y[:4], 2)
        model.zero_grad(set_to_none)
        backpropagate(model, x, y, 4)
        assert exact(stats, expected)
        model.zero_grad(set_to_none)
    close(stats.second_moment["0.bias"], by_definition((expected["0.bias"] * B).unflatten(0, (3, 4)).mean(1), 4)[0])


def test_what_is_not_backpropagated_leaves_no_trace(setting):
    model, x, y, expected, stats = setting
    for start in (0, 4, 8):
        loss = F.cross_entropy(model(x[start : start + 4]), y[start : start + 4]) / 3
        model(x[:5])
        with torch.no_grad():
            model(x[:7])
        torch.autograd.grad(model(x[:3]).sum(), list(model.parameters()))
        loss.backward()
    assert exact(stats, expected)


def test_layer_skipped_by_a_micro_batch():
    """It contributes nothing there, and the pass counts all the same."""

    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x, both):
            return self.b(self.a(x)) if both else self.a(x)

    for first in (True, False):
        model, x = Skips().double(), torch.randn(4, 4).double()
        stats = attach(model, "norms", engine="microbatch", granularity="microbatch", microbatch_size=2)
        for rows, both in ((slice(0, 2), first), (slice(2, 4), not first)):
            model(x[rows], both).square().sum().backward()
        assert stats.window("a.weight", ()).batch_size == 2
        if first:
            assert (stats.norms["b.weight"] > 0).tolist() == [True, False]


def test_two_forwards_declared_new_examples_are_one_micro_batch(setting):
    model, x, y, expected, stats = setting
    for start in (0, 4, 8):
        first = F.cross_entropy(model(x[start : start + 1]), y[start : start + 1])
        stats.new_examples()
        second = F.cross_entropy(model(x[start + 1 : start + 4]), y[start + 1 : start + 4])
        ((first + 3 * second) / B).backward()
    assert exact(stats, expected)


def test_parameters_moved_and_unfrozen_after_attach():
    model, x, y = problem()
    model.float()
    expected = oracle.contributions(copy.deepcopy(model), F.cross_entropy, x, y)
    model[0].requires_grad_(False)
    stats = attach(model, "second_moment", "variance", engine="microbatch")
    model(x[:2].float()).sum().backward()
    assert list(stats.second_moment) == ["2.weight", "2.bias"]
    model.zero_grad()
    model.double()
    model[0].requires_grad_(True)
    backpropagate(model, x, y, 4)
    assert exact(stats, expected)


def test_a_part_in_another_dtype_and_back():
    """As to evaluate in it: torch makes new accumulators at both changes."""
    model, x, y = problem()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.float())  # so that nothing is lost on the way
    expected = oracle.contributions(copy.deepcopy(model), F.cross_entropy, x, y)
    stats = attach(model, "second_moment", "variance", engine="microbatch")
    backpropagate(model, x, y, 4)
    model[2].float().double()
    model.zero_grad()
    backpropagate(model, x, y, 4)
    assert stats.batch_size == B and exact(stats, expected)


def refused_siamese(model, x, y):
    (F.cross_entropy(model(x[:4]), y[:4]) + F.cross_entropy(model(-x[:4]), y[:4])).backward()


def refused_two_in_flight(model, x, y):
    first, second = model(x[:4]).sum(), model(x[4:8]).sum()
    first.backward()
    second.backward()


def refused_second_backward(model, x, y):
    loss = model(x[:4]).sum()
    loss.backward(retain_graph=True)
    loss.backward()


def refused_penalty_alone(model, x, y):
    sum(p.square().sum() for p in model.parameters()).backward()


@pytest.mark.parametrize(
    ("use", "way_out"),
    [
        (refused_siamese, r"called twice.*stats.new_examples\(\)"),
        (refused_two_in_flight, r"stats.new_examples\(\)"),
        (refused_second_backward, "backpropagated twice"),
        (refused_penalty_alone, "without going through what Sequential returned.*Call Sequential itself"),
    ],
)
def test_refused_and_usable_afterwards(setting, use, way_out):
    model, x, y, expected, stats = setting
    with pytest.raises(LifetimeError, match=way_out):
        use(model, x, y)
    with pytest.raises(MissingStatistic, match="no statistics"):
        stats.second_moment["0.weight"]
    backpropagate(model, x, y, 4)
    with pytest.raises(LifetimeError, match=r"'0.weight' holds more.*zero_grad"):
        stats.second_moment["0.weight"]
    model.zero_grad()
    backpropagate(model, x, y, 4)
    assert exact(stats, expected)


def test_backward_cut_short_by_an_exception(setting):
    model, x, y, expected, stats = setting
    backpropagate(model, x, y, 4)
    model.zero_grad()
    hook = model[0].weight.register_hook(lambda g: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        backpropagate(model, x, y, 4)
    hook.remove()
    with pytest.raises(LifetimeError, match="cut short by an exception.*zero_grad"):
        stats.second_moment["0.weight"]
    model.zero_grad()
    backpropagate(model, x, y, 4)
    assert exact(stats, expected)


class Fails(BlockStatistic):
    name, per = "fails", "element"

    def partial(self, block):
        if len(block.c) and block.c[0, 0] > 0:
            raise RuntimeError("it fails")
        return block.c.sum(0)

    def read(self, window):
        return window.sums[self.key]


def test_sums_cut_short_by_an_exception():
    """Not even the sums of the passes before are there to be read: p.grad has more."""
    model, x = nn.Linear(3, 2, bias=False), -torch.ones(1, 3)
    stats = attach(model, Fails, "second_moment", engine="microbatch", granularity="microbatch", microbatch_size=1)
    model(x).sum().backward()
    with pytest.raises(RuntimeError, match="it fails"):
        model(-x).sum().backward()
    with pytest.raises(MissingStatistic, match="has no statistics"):
        stats.second_moment["weight"]
    model.zero_grad()
    model(x).sum().backward()
    close(stats.second_moment["weight"], torch.ones(2, 3))


def test_gradient_changed_between_passes_or_after_them(setting):
    model, x, y, _, stats = setting
    backpropagate(model, x, y, 4)
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    assert stats.second_moment["0.weight"].isfinite().all()
    with pytest.raises(LifetimeError, match="'0.weight' was changed in place"):
        stats.variance["0.weight"]
    backpropagate(model, x, y, 4)
    with pytest.raises(LifetimeError, match="'0.weight' holds more"):
        stats.second_moment["0.weight"]


# Refusals


def test_micro_batches_that_tell_nothing():
    model, x, y = problem()
    stats = attach(model, "second_moment", engine="microbatch")
    with pytest.raises(MissingStatistic, match="no backward pass"):
        stats.second_moment["0.weight"]
    backpropagate(model, x, y, B)
    with pytest.raises(GradstatsError, match=r"one micro-batch of 12.*engine='fused'"):
        stats.second_moment["0.weight"]
    model.zero_grad()
    backpropagate(model, x, y, 5)
    assert stats.batch_size == B
    with pytest.raises(LifetimeError, match=r"over 5, 5, 2 examples.*drop_last=True"):
        stats.second_moment["0.weight"]
    stats.detach()
    model.zero_grad()
    stats = attach(model, engine="microbatch", granularity="microbatch", microbatch_size=3)
    backpropagate(model, x, y, 4)
    with pytest.raises(LifetimeError, match="over 4 examples, not over microbatch_size=3"):
        stats.second_moment["0.weight"]


@pytest.mark.parametrize("statistic", [name for name in STATISTICS if name not in ESTIMATED])
def test_statistics_without_an_unbiased_estimate_are_refused(statistic):
    model, x, y = problem()
    with pytest.raises(GradstatsError, match=rf"'{statistic}' of single examples.*engine='fused', or granularity"):
        attach(model, statistic, engine="microbatch")
    stats = attach(model, *ESTIMATED, engine="microbatch")
    backpropagate(model, x, y, 4)
    with pytest.raises(GradstatsError, match=rf"'{statistic}' of single examples"):
        stats.read(statistic)


def test_set_up_errors():
    model, _, _ = problem()
    for statistic in PAIRS:
        with pytest.raises(GradstatsError, match=rf"'{statistic}' needs the gradients of all.*'projection'"):
            attach(model, statistic, engine="microbatch", granularity="microbatch", microbatch_size=2)
    with pytest.raises(GradstatsError, match="no positions: use engine='fused'"):
        attach(model, engine="microbatch", granularity="token")
    with pytest.raises(GradstatsError, match="no parameter or module is called '1'"):
        attach(model, engine="microbatch", ignore=["1"])
    with pytest.raises(CoverageError, match="'weight' is complex"):
        attach(nn.Linear(2, 2, dtype=torch.complex64), engine="microbatch")
    with pytest.raises(CoverageError, match="'weight' is not initialised: call the model once"):
        attach(nn.LazyLinear(3), engine="microbatch")
    with pytest.raises(CoverageError, match="no trainable parameters"):
        attach(nn.ReLU(), engine="microbatch")
    stats = attach(model, engine="microbatch", ignore=["0"])
    assert attached(model) is stats
    assert ["0.weight (7, 5) ignored named in ignore" in " ".join(stats.coverage().split())] == [True]
    with pytest.raises(GradstatsError, match="attached already"):
        attach(model, engine="microbatch")
    with pytest.raises(GradstatsError, match="cannot be copied: detach"):
        copy.deepcopy(model)


def test_output_without_tensors_is_refused():
    class Hides(nn.Linear):
        def forward(self, x):
            return type("Output", (), {"logits": super().forward(x)})()

    model = Hides(4, 3)
    attach(model, engine="microbatch")
    with pytest.raises(CoverageError, match="Hides returns no tensor.*torch.no_grad"):
        model(torch.randn(2, 4))


def test_detach_leaves_the_model_as_it_was_and_nothing_leaks():
    model, x, y = problem()
    stats = attach(model, engine="microbatch")
    backpropagate(model, x, y, 4)
    stats.detach()
    model.zero_grad()
    backpropagate(model, x, y, 4)
    assert not model._forward_hooks and not any(p._backward_hooks for p in model.parameters())
    reference = weakref.ref(attach(model, engine="microbatch"))
    backpropagate(model, x, y, 4)
    assert reference() is not None
    del model, stats
    gc.collect()
    assert reference() is None


def test_ignored_by_any_of_its_names():
    embedding, head, body = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False), nn.Linear(4, 4)
    model = nn.ModuleDict({"embedding": embedding, "head": head, "body": body})
    head.weight = embedding.weight
    stats = attach(model, engine="microbatch", ignore=["head.weight"])
    assert list(stats.second_moment) == ["body.weight", "body.bias"]
