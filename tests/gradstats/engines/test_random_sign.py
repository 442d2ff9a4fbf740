"""Signs: right on average over all their orders, with the variance that is claimed, exact with enough of them, and
never beside a gradient that they have not seen."""

import copy
import gc
import itertools
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from experiments.benchmarks.meter import Profiled
from gradstats import CoverageError, GradstatsError, LifetimeError, MissingStatistic, attach, attached
from gradstats.engines.contrasts import contrasts
from gradstats.optim import BatchInvariantAdam
from gradstats.statistics import STATISTICS
from tests import oracle
from tests.gradstats.engines import test_matrix, test_microbatch

B = 6
ENOUGH = 7  # probes, for up to eight examples
ESTIMATED = ("second_moment", "variance", "noise_scale")


def problem(b=B):
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    return model, torch.randn(b, 5).double(), torch.randint(0, 3, (b,))


def losses_of(model, x, y):
    return F.cross_entropy(model(x), y, reduction="none")


def close(found, expected, **tolerance):
    torch.testing.assert_close(found, expected, **{"rtol": 1e-10, "atol": 1e-12} | tolerance)


def exact(stats, expected, statistics=("second_moment", "variance")):
    for name, c in expected.items():
        for statistic in statistics:
            close(stats.read(statistic)[name], getattr(oracle, statistic)(c))
    return True


def variance_of_estimate(d, n, k):
    """Of D^, from the deviations d (B, ...): contrasts.py."""
    total, fourth = d.square().sum(0), d.pow(4).sum(0)
    of_one = 2 * ((n * n - 3 * n + 3) * total**2 - n * (n - 1) * fourth) / (n * (n - 3))
    return of_one * (n - 1 - k) / (k * (n - 2))


def order(monkeypatch, columns):
    monkeypatch.setattr(torch, "randperm", lambda n, **options: torch.tensor(columns))


# Contrasts


@pytest.mark.parametrize("b", [1, 2, 3, 4, 6, 8, 13, 16])
def test_all_contrasts_tell_exactly(b):
    n = 2 ** (b - 1).bit_length()
    w, factor = contrasts(b, 100, torch.Generator().manual_seed(b))
    assert len(w) == n - 1
    c = torch.randn(b, 4).double()
    close(factor * (w @ c).square().sum(0), (c - c.mean(0)).square().sum(0))
    close(w.sum(1), torch.zeros(n - 1).double())


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("b", [5, 8])
def test_mean_and_variance_over_all_orders(monkeypatch, b, k):
    """The first example keeps its place: moving all columns by xor changes signs of whole rows only."""
    c = torch.randn(b, 3).double() ** 3 + 1
    d, found = c - c.mean(0), []
    for columns in itertools.permutations(range(1, 8)):
        order(monkeypatch, (0, *columns))
        w, factor = contrasts(b, k, torch.Generator())
        found.append(factor * (w @ c).square().sum(0))
    close(torch.stack(found).mean(0), d.square().sum(0))
    close(torch.stack(found).var(0, correction=0), variance_of_estimate(d, 8, k))


def test_balanced_signs_are_exact_where_one_example_contributes():
    """As rows of an embedding are; signs that are not balanced would mix the mean gradient in."""
    c = torch.zeros(16, 1).double()
    c[3] = 2
    w, factor = contrasts(16, 1, torch.Generator().manual_seed(0))
    close(factor * (w @ c).square().sum(0) + c.sum(0).square() / 16, c.square().sum(0))


# The engine


def conv_net():
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)).double()


@pytest.mark.parametrize("probes", [1, 2, 3])
@pytest.mark.parametrize("loss_reduction", ["mean", "sum"])
@pytest.mark.parametrize("b", [3, 4])
def test_batch_norm_on_average_over_all_orders(monkeypatch, b, loss_reduction, probes):
    model, x, y = conv_net(), torch.randn(b, 2, 4, 4).double(), torch.randint(0, 3, (b,))
    expected = oracle.contributions(model, F.cross_entropy, x, y)
    expected.pop("0.bias")  # which BatchNorm takes away: rounding only
    scale = b if loss_reduction == "sum" else 1
    stats = attach(model, *ESTIMATED, engine="random_sign", loss_reduction=loss_reduction, probes=probes)
    found, traces = {name: [] for name in expected}, []
    for columns in itertools.permutations(range(4)):
        order(monkeypatch, columns)
        model.zero_grad()
        stats.backward(losses_of(model, x, y))
        assert stats.batch_size == b
        for name, c in expected.items():
            close(model.get_parameter(name).grad, scale * c.sum(0))
            found[name].append(stats.second_moment[name])
            close(stats.variance[name], (found[name][-1] - (c * b).mean(0).square()) * b / (b - 1))
            assert (stats.variance[name] >= 0).all()
        traces.append(sum(stats.noise_scale[name].trace for name in expected))
    for name, c in expected.items():
        close(torch.stack(found[name]).mean(0), oracle.second_moment(c), atol=1e-14)
        d = (c - c.mean(0)) * b / b**0.5  # q is D^ of these, and what does not vary
        close(torch.stack(found[name]).var(0, correction=0), variance_of_estimate(d, 4, probes), atol=1e-12)
    close(torch.stack(traces).mean(), sum(oracle.variance(c).sum() for c in expected.values()))


@pytest.mark.parametrize("name", test_matrix.MODELS)
def test_enough_probes_are_exact(name):
    model, x, y = test_matrix.problem(name)
    expected = oracle.contributions(model, F.cross_entropy, x, y)
    stats = attach(model, *ESTIMATED, engine="random_sign", probes=ENOUGH)
    loss = stats.backward(losses_of(model, x, y))
    close(loss, F.cross_entropy(model(x), y).detach())
    for statistic in ESTIMATED:
        test_matrix.agrees(stats, statistic, expected)


@pytest.mark.parametrize("name", [name for name in test_microbatch.MODELS if not name.startswith("recomputed")])
def test_any_model(name):
    model, x = getattr(test_microbatch.Models, name)()
    model, x = model.double(), x[:B].double() if x.is_floating_point() else x[:B]
    y, rows = torch.randint(0, 3, (B,)), []

    def losses():
        return losses_of((lambda x: model(x=x)["logits"][0]) if name == "dictionary" else model, x, y)

    for b in range(B):
        model.zero_grad()
        (losses()[b] / B).backward()
        rows.append({n: p.grad.to_dense() for n, p in model.named_parameters()})
    model.zero_grad()
    stats = attach(model, "second_moment", "variance", engine="random_sign", probes=ENOUGH)
    stats.backward(losses())
    assert exact(stats, {n: torch.stack([row[n] for row in rows]) for n in rows[0]})


def test_checkpoints():
    model, x, y = problem()
    expected = oracle.contributions(model, F.cross_entropy, x, y)
    stats = attach(model, "second_moment", "variance", engine="random_sign", probes=ENOUGH)
    stats.backward(losses_of(lambda x: model[2](checkpoint(model[:2], x, use_reentrant=False)), x, y))
    assert exact(stats, expected)


@pytest.mark.parametrize("b", [1, 2])
def test_few_examples_take_fewer_probes(b):
    model, x, y = problem(b)
    expected = oracle.contributions(model, F.cross_entropy, x, y)
    stats = attach(model, engine="random_sign")
    losses, passes = losses_of(model, x, y), []
    losses.register_hook(passes.append)
    stats.backward(losses)
    assert (len(passes), stats.batch_size) == (b, b)
    assert exact(stats, expected, ["second_moment"])


def test_norms_alone_keep_one_number_a_parameter():
    model, x, y = problem()
    expected = oracle.contributions(model, F.cross_entropy, x, y)
    stats = attach(model, "noise_scale", engine="random_sign", probes=ENOUGH)
    stats.backward(losses_of(model, x, y))
    test_matrix.agrees(stats, "noise_scale", expected)
    sums, _ = stats.sums("0.weight", ["squared_norms"])
    assert sums["squared_norms"].numel() == 1


def test_memory_is_of_two_gradients_more():
    """And of single parameters, whatever the number of probes; in a second window too, beside the sums of the first."""
    layers, width = 12, 64
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    x, gradient = torch.randn(4, width), 4 * layers * width**2

    def peak(backward):
        meter = Profiled()
        with meter.contestant(), meter.steps():
            for _ in range(2):
                model.zero_grad()
                backward(model(x).square().sum(1))
        return meter.peak

    plain = peak(lambda losses: losses.mean().backward())
    stats = attach(model, engine="random_sign", probes=3)
    model.zero_grad()
    assert plain + 1.9 * gradient < peak(stats.backward) < plain + (2 + 4 / layers) * gradient


def test_squares_are_wide():
    model, x, y = problem()
    model.bfloat16()
    stats = attach(model, engine="random_sign")
    stats.backward(losses_of(model, x.bfloat16(), y) * 1e-25)
    assert stats.second_moment["0.weight"].dtype == torch.float32
    stats.zero()
    model.float().zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        stats.backward(losses_of(model, x.float(), y))
        assert stats.second_moment["0.weight"].dtype == torch.float32


# What is seen from outside


def test_gradients_hooks_and_random_numbers_are_those_of_the_plain_step():
    found = []
    for signs in (False, True):
        torch.manual_seed(0)
        model, x, y = problem()
        model.insert(1, nn.Dropout(0.5))
        seen = []
        if signs:
            stats = attach(model, engine="random_sign", probes=2)
        model[0].weight.register_post_accumulate_grad_hook(lambda p, seen=seen: seen.append(p.grad.clone()))
        for _ in range(2):
            losses = losses_of(model, x, y)
            assert (stats.backward(losses) if signs else losses.mean().backward()) is None or signs
        found.append((*(p.grad for p in model.parameters()), *seen, torch.rand(1)))
        assert len(seen) == 2
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_generators_decide():
    model, x, y = problem(16)

    def estimates(generator=None):
        with attach(model, engine="random_sign", generator=generator) as stats:
            for _ in range(2):
                model.zero_grad()
                stats.backward(losses_of(model, x, y))
                yield stats.second_moment["0.weight"]

    seeded = [list(estimates(torch.Generator().manual_seed(seed))) for seed in (0, 0, 1)] + [list(estimates())]
    assert torch.equal(seeded[0][0], seeded[1][0]) and torch.equal(seeded[0][1], seeded[1][1])
    assert torch.equal(seeded[0][0], seeded[3][0])
    assert not torch.equal(seeded[0][0], seeded[2][0])
    assert not torch.equal(seeded[0][0], seeded[0][1])


def test_a_hook_that_multiplies_gradients_multiplies_contributions():
    model, x, y = problem()
    expected = oracle.contributions(model, F.cross_entropy, x, y)
    model[0].weight.register_hook(lambda g: 3 * g)
    stats = attach(model, "second_moment", "variance", engine="random_sign", probes=ENOUGH)
    stats.backward(losses_of(model, x, y))
    assert exact(stats, expected | {"0.weight": 3 * expected["0.weight"]})


@pytest.mark.parametrize("engine", ["fused", "vmap", "microbatch", "random_sign"])
def test_backward_is_a_method_of_every_engine(engine):
    model, x, y = problem()
    for loss_reduction in ("mean", "sum"):
        model.zero_grad()
        expected = torch.autograd.grad(getattr(losses_of(model, x, y), loss_reduction)(), list(model.parameters()))
        with attach(model, engine=engine, loss_reduction=loss_reduction) as stats:
            loss = stats.backward(losses_of(model, x, y))
            assert (loss.shape, loss.requires_grad, stats.batch_size) == ((), False, B)
        for p, gradient in zip(model.parameters(), expected, strict=True):
            close(p.grad, gradient)


# Optimizers, clipping, loss scales


@pytest.mark.parametrize("reference", [1, 4, 64])
def test_optimizer_takes_fused_steps(reference):
    found = []
    for engine in ("fused", "random_sign"):
        torch.manual_seed(0)
        model, x, y = problem()
        stats = attach(model, engine=engine, **({"probes": ENOUGH} if engine == "random_sign" else {}))
        optimizer = BatchInvariantAdam(model.parameters(), lr=0.01, batch_size=64, reference_batch_size=reference)
        for _ in range(3):
            optimizer.zero_grad()
            stats.backward(losses_of(model, x, y))
            optimizer.step()
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    close(found[1], found[0])


def test_one_step_by_hand():
    """From the estimate of a single probe."""
    model, x, y = problem()
    stats = attach(model, "second_moment", "variance", engine="random_sign")
    optimizer = BatchInvariantAdam(model.parameters(), lr=0.01, batch_size=B, reference_batch_size=2)
    stats.backward(losses_of(model, x, y))
    p = model[0].weight
    v = p.grad.square() + (1 / 2 - 1 / B) * stats.variance[p]
    expected = p.detach() - 0.01 * p.grad / (v.sqrt() + 1e-8)
    optimizer.step()
    close(p.detach(), expected)


def test_clipping():
    model, x, y = problem()
    expected = oracle.contributions(model, F.cross_entropy, x, y)
    stats = attach(model, "second_moment", "variance", engine="random_sign", probes=ENOUGH)
    stats.backward(losses_of(model, x, y))
    norm = stats.clip_grad_norm_(1e-3)
    f = 1e-3 / (norm + 1e-6)
    assert exact(stats, {name: c * f for name, c in expected.items()})
    nn.utils.clip_grad_norm_(model.parameters(), 1e-4)
    with pytest.raises(LifetimeError, match="'0.weight' was changed in place"):
        stats.variance["0.weight"]


def test_grad_scaler():
    model, x, y = problem()
    expected = oracle.contributions(model, F.cross_entropy, x, y)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = BatchInvariantAdam(model.parameters(), lr=0.01, batch_size=B)
    stats = attach(model, "second_moment", "variance", engine="random_sign", probes=ENOUGH, grad_scaler=scaler)
    for start in (0, 4):
        part = losses_of(model, x[start : start + 4], y[start : start + 4])
        stats.backward(scaler.scale(part * len(part) / B))
    assert exact(stats, expected)
    scaler.unscale_(optimizer)
    assert exact(stats, expected)
    scaler.step(optimizer)
    scaler.update()


def test_a_probe_that_overflows_is_a_step_left_out():
    """GradScaler looks at gradients only, and an infinite second moment would never leave an average."""
    model, x, y = problem()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = BatchInvariantAdam(model.parameters(), lr=0.01, batch_size=B)
    stats = attach(model, engine="random_sign", grad_scaler=scaler)
    factors = iter((float("inf"), 1, 1, 1))
    model[0].weight.register_hook(lambda g: g * next(factors))
    before = [p.detach().clone() for p in model.parameters()]
    for moved in (False, True):
        optimizer.zero_grad()
        stats.backward(scaler.scale(losses_of(model, x, y)))
        scaler.step(optimizer)
        scaler.update()
        for p, old in zip(model.parameters(), before, strict=True):
            assert p.isfinite().all() and torch.equal(p, old) is not moved
    assert scaler.get_scale() == 2.0**9


# Lifetime


@pytest.fixture
def setting():
    model, x, y = problem()
    expected = oracle.contributions(model, F.cross_entropy, x, y)
    return model, x, y, expected, attach(model, "second_moment", "variance", engine="random_sign", probes=ENOUGH)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_calls_add_up_until_gradients_are_zeroed(setting, set_to_none):
    """Unequal ones, each loss over its share of the batch."""
    model, x, y, expected, stats = setting
    for _ in range(3):
        stats.backward(losses_of(model, -x, y))
        model.zero_grad(set_to_none)
        for rows in (slice(0, 1), slice(1, 6)):
            part = losses_of(model, x[rows], y[rows])
            stats.backward(part * len(part) / B)
        assert stats.batch_size == B and exact(stats, expected)
        model.zero_grad(set_to_none)


def test_variances_are_never_negative():
    """Nor what is added up of several calls."""
    model, x, y = problem(12)
    stats = attach(model, "second_moment", "variance", engine="random_sign")
    for rows in (slice(0, 5), slice(5, 12)):
        stats.backward(losses_of(model, x[rows], y[rows]) * (rows.stop - rows.start) / 12)
        for p in model.parameters():
            q, m = stats.second_moment[p], p.grad if rows.stop == 12 else p.grad * 12 / 5
            assert rows.stop < 12 or (q - m.square() > -1e-14).all()


def test_what_is_not_backpropagated_leaves_no_trace(setting):
    model, x, y, expected, stats = setting
    losses = losses_of(model, x, y)
    model(x[:5])
    torch.autograd.grad(model(x[:3]).sum(), list(model.parameters()))
    stats.backward(losses)
    torch.autograd.grad(model(x[:3]).sum(), list(model.parameters()))
    assert exact(stats, expected)


def test_parameter_that_a_call_does_not_reach():
    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.b, self.a = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x, both):
            return (self.b(self.a(x)) if both else self.a(x)).square().sum(1)

    for first in (True, False):
        model, x = Skips().double(), torch.randn(4, 4).double()
        stats = attach(model, engine="random_sign", probes=3)
        c = {"a.weight": [], "b.weight": []}
        for rows, both in ((slice(0, 2), first), (slice(2, 4), not first)):
            for row in x[rows].split(1):
                found = torch.autograd.grad(model(row, both) / 4, [model.a.weight, model.b.weight], allow_unused=True)
                for name, g in zip(c, found, strict=True):
                    c[name].append(torch.zeros(4, 4).double() if g is None else g)
            stats.backward(model(x[rows], both) / 2)
        for name, contributions in c.items():
            assert stats.window(name, ()).batch_size == len(contributions)
            close(stats.second_moment[name], oracle.second_moment(torch.stack(contributions)))


def test_parameters_moved_and_unfrozen_after_attach():
    model, x, y = problem()
    model.float()
    expected = oracle.contributions(copy.deepcopy(model), F.cross_entropy, x, y)
    model[0].requires_grad_(False)
    stats = attach(model, "second_moment", "variance", engine="random_sign", probes=ENOUGH)
    stats.backward(model(x[:2].float()).sum(1))
    assert list(stats.second_moment) == ["2.weight", "2.bias"]
    model.zero_grad()
    model.double()
    model[0].requires_grad_(True)
    stats.backward(losses_of(model, x, y))
    assert exact(stats, expected)


@pytest.mark.parametrize("first", [True, False])
def test_a_loss_backpropagated_by_other_means(setting, first):
    model, x, y, expected, stats = setting
    optimizer = BatchInvariantAdam(model.parameters(), lr=0.01, batch_size=B)
    if first:
        losses_of(model, x, y).mean().backward()
        with pytest.raises(LifetimeError, match=r"'0.weight'.*by other means than stats.backward\(losses\)"):
            stats.second_moment["0.weight"]
    stats.backward(losses_of(model, x, y))
    if not first:
        assert exact(stats, expected)
        losses_of(model, x, y).mean().backward()
    for use in (optimizer.step, lambda: stats.second_moment["0.weight"]):
        with pytest.raises(LifetimeError, match=r"'0.weight'.*Call zero_grad\(\)"):
            use()
    model.zero_grad()
    stats.backward(losses_of(model, x, y))
    assert exact(stats, expected)


def test_gradient_changed_between_calls(setting):
    model, x, y, _, stats = setting
    stats.backward(losses_of(model, x[:3], y[:3]))
    model[0].weight.grad.mul_(0.5)
    stats.backward(losses_of(model, x[3:], y[3:]))
    with pytest.raises(LifetimeError, match="'0.weight' holds more.*changed between two of these"):
        stats.second_moment["0.weight"]
    assert stats.second_moment["0.bias"].isfinite().all()


def test_same_losses_again(setting):
    model, x, y, expected, stats = setting
    losses = losses_of(model, x, y)
    stats.backward(losses)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        stats.backward(losses)
    assert exact(stats, expected)


def test_cut_short_by_an_exception(setting):
    model, x, y, _, stats = setting

    def fails(p):
        raise ValueError("interrupted")

    hook = model[0].weight.register_post_accumulate_grad_hook(fails)
    with pytest.raises(ValueError, match="interrupted"):
        stats.backward(losses_of(model, x, y))
    with pytest.raises(LifetimeError, match="cut short by an exception"):
        stats.second_moment["2.bias"]
    hook.remove()
    stats.backward(losses_of(model, x, y))
    with pytest.raises(LifetimeError, match="'2.bias' holds more"):
        stats.second_moment["2.bias"]


def test_cut_short_and_then_layers_called_one_by_one(setting):
    model, x, y, expected, stats = setting
    hook = model[0].weight.register_post_accumulate_grad_hook(lambda p: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        stats.backward(losses_of(model, x, y))
    hook.remove()
    model.zero_grad()
    stats.backward(losses_of(lambda x: model[2](model[1](model[0](x))), x, y))
    assert exact(stats, expected)


# Refusals


@pytest.mark.parametrize("engine", ["random_sign", "fused"])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda losses: losses.mean(), "reduced already.*reduction='none'"),
        (lambda losses: losses.unsqueeze(1).expand(-1, 2), r"shape \(6, 2\).*losses.flatten\(1\).mean\(1\)"),
        (lambda losses: losses.detach(), "depend on no parameter.*detached"),
        (lambda losses: losses[:0], "no examples"),
        (lambda losses: losses.tolist(), r"a tensor \(B,\), one an example, not list"),
    ],
)
def test_losses_that_are_not_one_an_example(wrong, message, engine):
    model, x, y = problem()
    stats = attach(model, engine=engine)
    with pytest.raises(GradstatsError, match=message):
        stats.backward(wrong(losses_of(model, x, y)))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("statistic", [name for name in STATISTICS if name not in ESTIMATED])
def test_statistics_without_an_unbiased_estimate_are_refused(setting, statistic):
    stats = setting[-1]
    with pytest.raises(GradstatsError, match=rf"'{statistic}' cannot be estimated.*engine='fused'"):
        attach(nn.Linear(2, 2), statistic, engine="random_sign")
    with pytest.raises(GradstatsError, match=rf"'{statistic}' cannot be estimated"):
        stats.read(statistic)


def test_reentrant_checkpoints_are_refused_by_torch():
    model, x = test_microbatch.Models.recomputed()
    stats = attach(model, engine="random_sign")
    with pytest.raises(RuntimeError, match="use_reentrant=True.*incompatible"):
        stats.backward(model(x).sum(1))
    assert stats.batch_size == 0


def test_set_up_errors():
    model, x, y = problem()
    for options, message in (
        ({"granularity": "token"}, "no granularity='token': use engine='fused'"),
        ({"granularity": "microbatch", "microbatch_size": 2}, "no granularity='microbatch'"),
        ({"example_dims": 1}, r"from the losses \(B,\)"),
        ({"probes": 0}, "at least 1; got 0"),
        ({"probes": 1.5}, "at least 1; got 1.5"),
        ({"engine": "fused", "probes": 2}, "probes and generator are for engine='random_sign'"),
        ({"engine": "fused", "generator": torch.Generator()}, "generator are for engine='random_sign'"),
    ):
        with pytest.raises(GradstatsError, match=message):
            attach(model, **{"engine": "random_sign"} | options)
    with pytest.raises(CoverageError, match="no trainable parameters"):
        attach(nn.ReLU(), engine="random_sign")
    stats = attach(model, engine="random_sign", ignore=["0"])
    assert attached(model) is stats
    with pytest.raises(MissingStatistic, match=r"Call stats.backward\(losses\)"):
        stats.second_moment["2.weight"]
    with pytest.raises(GradstatsError, match="cannot be copied: detach"):
        copy.deepcopy(model)
    stats.backward(losses_of(model, x, y))
    assert list(stats.second_moment) == ["2.weight", "2.bias"] and model[0].weight.grad is not None
    stats.detach()
    with pytest.raises(MissingStatistic, match="detached"):
        stats.backward(losses_of(model, x, y))


def test_nothing_leaks():
    model, x, y = problem()
    reference = weakref.ref(attach(model, engine="random_sign"))
    stats = reference()
    stats.backward(losses_of(model, x, y))
    del stats
    gc.collect()
    assert reference() is not None
    del model
    gc.collect()
    assert reference() is None
