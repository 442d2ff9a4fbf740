"""Low precision and loss scaling: statistics are those of the loss itself, whatever it was multiplied by."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradstats
from gradstats import LifetimeError, attach
from gradstats.optim import BatchInvariantAdam
from gradstats.statistics import STATISTICS
from tests import oracle

B = 6
SCALE = 2.0**14
MEANS = ("variance", "snr", "noise_scale")  # that take the mean gradient from p.grad
OPTIONS = {
    "fused": {},
    "vmap": {"engine": "vmap"},
    "opacus": {"engine": "opacus"},
    "microbatch": {"engine": "microbatch", "granularity": "microbatch", "microbatch_size": 3},
}

# Opacus' full backward hooks warn when the input of the first layer needs no gradient.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")


def problem(dtype=torch.float64):
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)
    return model, torch.randn(B, 5, dtype=dtype), torch.randint(0, 3, (B,))


def scaler_of(scale=SCALE, **options):
    return torch.amp.GradScaler("cpu", init_scale=scale, **options)


def backpropagate(model, x, y, scaler, size=3):
    for start in range(0, B, size):
        rows = slice(start, start + size)
        scaler.scale(F.cross_entropy(model(x[rows]), y[rows]) * size / B).backward()


def everything(stats, names):
    """Numbers of every statistic of every parameter, and of the whole gradient."""
    found = {}
    for name in names:
        entries = dict(stats.read(name))
        if stats.read(name).has_total:
            entries["total"] = stats.read(name).total
        for key, value in entries.items():
            found[name, key] = filled_bins(value) if name == "histogram" else value
    return found


def filled_bins(histogram):
    """With their lower edges: the bins are of what was backpropagated, scaled or not."""
    filled = histogram.counts > 0
    return histogram.counts[filled], histogram.edges[:-1][filled], histogram.zeros


def same(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(
            found[key], value, rtol=1e-12, atol=1e-12, msg=lambda text, key=key: f"{key}: {text}"
        )


@pytest.mark.parametrize("engine", OPTIONS)
def test_every_statistic_at_every_moment_of_a_step(engine):
    """Two accumulation steps; then unscale_, step and update (to another scale), twice over."""
    menu = [name for name in STATISTICS if name not in ("gram", "cosine_similarity")]
    model, x, y = problem()
    with attach(model, *menu, **OPTIONS[engine]) as stats:
        backpropagate(model, x, y, scaler_of(enabled=False))
        expected = everything(stats, menu)
        mean = model[0].weight.grad.clone()
        model.zero_grad()
    scaler, optimizer = scaler_of(), torch.optim.SGD(model.parameters(), lr=0.0)
    stats = attach(model, *menu, grad_scaler=scaler, **OPTIONS[engine])
    for set_to_none in (True, False):
        backpropagate(model, x, y, scaler)
        scale = scaler.get_scale()
        torch.testing.assert_close(model[0].weight.grad, mean * scale)
        same(everything(stats, menu), expected)
        scaler.unscale_(optimizer)
        torch.testing.assert_close(model[0].weight.grad, mean)
        same(everything(stats, menu), expected)
        scaler.step(optimizer)
        scaler.update(scale / 2)
        same(everything(stats, menu), expected)
        optimizer.zero_grad(set_to_none)
        if set_to_none:
            without = [name for name in menu if name not in MEANS]
            same(everything(stats, without), {key: v for key, v in expected.items() if key[0] in without})


def test_pairs_of_examples():
    model, x, y = problem()
    pairs = ("gram", "cosine_similarity")
    with attach(model, *pairs) as stats:
        backpropagate(model, x, y, scaler_of(enabled=False), B)
        expected = everything(stats, pairs)
        model.zero_grad()
    scaler = scaler_of()
    with attach(model, *pairs, grad_scaler=scaler) as stats:
        backpropagate(model, x, y, scaler, B)
        same(everything(stats, pairs), expected)


def test_scaler_that_is_disabled():
    model, x, y = problem()
    expected = oracle.contributions(model, F.cross_entropy, x, y)
    scaler = scaler_of(enabled=False)
    stats = attach(model, *oracle.STATISTICS, grad_scaler=scaler)
    backpropagate(model, x, y, scaler)
    assert oracle.worst(oracle.errors(stats, expected)) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("engine", ["fused", "microbatch"])
def test_autocast(dtype, engine):
    """Scaled contributions of above 300 and below 2^-14: their squares have no place in float16."""
    model, x, y = problem(torch.float32)
    expected = oracle.contributions(model, F.cross_entropy, x, y)
    scaler, size = scaler_of(), B if engine != "microbatch" else 1
    stats = attach(model, "second_moment", "variance", engine=engine, grad_scaler=scaler)
    for start in range(0, B, size):
        rows = slice(start, start + size)
        with torch.autocast("cpu", dtype=dtype):
            output = model(x[rows])
        assert output.dtype == dtype
        scaler.scale(F.cross_entropy(output.float(), y[rows]) * size / B).backward()
    assert max(float(c.abs().max()) for c in expected.values()) * SCALE > 300
    for name, c in expected.items():
        q = oracle.second_moment(c)
        assert stats.second_moment[name].dtype == stats.variance[name].dtype == torch.float32
        assert (stats.second_moment[name] - q).norm() <= 4e-2 * q.norm()
        assert (stats.variance[name] - oracle.variance(c)).norm() <= 4e-2 * q.norm()


def test_step_whose_gradients_overflow():
    """Statistics say so, the scaler skips the step, and the next one is right again at another scale."""
    model, x, y = problem(torch.float32)
    expected = oracle.contributions(model, F.cross_entropy, x, y)
    before = copy.deepcopy(model.state_dict())
    scaler, optimizer = scaler_of(2.0**127), torch.optim.SGD(model.parameters(), lr=0.1)
    stats = attach(model, *oracle.STATISTICS, grad_scaler=scaler)
    scaler.scale(100 * F.cross_entropy(model(x), y)).backward()
    assert not model[0].weight.grad.isfinite().all()
    scaler.step(optimizer)
    for statistic in (stats.second_moment, stats.variance, stats.norms):
        assert not statistic["0.weight"].isfinite().any()
    scaler.update()
    assert scaler.get_scale() == 2.0**126
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    optimizer.zero_grad()
    scaler.update(SCALE)
    backpropagate(model, x, y, scaler)
    assert oracle.worst(oracle.errors(stats, expected)) <= 1e-4


@pytest.mark.parametrize("engine", ["fused", "microbatch"])
def test_mixtures_of_scales_are_refused(engine):
    model, x, y = problem()
    scaler, optimizer = scaler_of(), torch.optim.SGD(model.parameters(), lr=0.0)
    stats = attach(model, *oracle.STATISTICS, **OPTIONS[engine], grad_scaler=scaler)
    backpropagate(model, x, y, scaler)
    scaler.update(2 * SCALE)
    backpropagate(model, x, y, scaler)
    for statistic in (stats.second_moment, stats.variance, stats.norms):
        with pytest.raises(LifetimeError, match=r"'0.weight' adds up.*different scales.*zero_grad"):
            statistic["0.weight"]
    optimizer.zero_grad()
    backpropagate(model, x, y, scaler)
    scaler.unscale_(optimizer)
    backpropagate(model, x, y, scaler)
    stats.second_moment["0.weight"]
    with pytest.raises(LifetimeError, match=r"'0.weight' was unscaled before another.*zero_grad"):
        stats.variance["0.weight"]


def test_gradient_changed_otherwise_is_refused():
    model, x, y = problem()
    scaler = scaler_of()
    stats = attach(model, "variance", grad_scaler=scaler)
    backpropagate(model, x, y, scaler)
    model[0].weight.grad.data.mul_(0.5)  # leaves no mark either
    with pytest.raises(LifetimeError, match=r"'0.weight' was changed.*other than grad_scaler.*max_norm"):
        stats.variance["0.weight"]
    nn.utils.clip_grad_norm_(model[2].parameters(), 1e-3)
    with pytest.raises(LifetimeError, match=r"'2.weight' was changed in place"):
        stats.variance["2.weight"]


def test_what_does_not_accumulate_leaves_no_trace():
    model, x, y = problem()
    expected = oracle.contributions(model, F.cross_entropy, x, y)
    scaler = scaler_of()
    stats = attach(model, *oracle.STATISTICS, grad_scaler=scaler)
    backpropagate(model, x, y, scaler)
    scaler.update(2 * SCALE)
    torch.autograd.grad(scaler.scale(model(x).sum()), list(model.parameters()))
    assert oracle.worst(oracle.errors(stats, expected)) <= 1e-12


@pytest.mark.parametrize("engine", ["fused", "microbatch"])
@pytest.mark.parametrize("reference", [1, 3])
def test_optimizer_divides_once(engine, reference):
    """BatchInvariantAdam knows the scale from the scaler itself."""
    found = []
    for scaler, given in ((scaler_of(enabled=False), False), (scaler_of(), False), (scaler_of(), True)):
        torch.manual_seed(0)
        model, x, y = problem()
        attach(model, engine=engine, **({"grad_scaler": scaler} if given else {}))
        optimizer = BatchInvariantAdam(model.parameters(), lr=0.01, batch_size=64, reference_batch_size=reference)
        for _ in range(3):
            optimizer.zero_grad()
            backpropagate(model, x, y, scaler)
            scaler.step(optimizer)
            scaler.update()
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[2], found[0], rtol=1e-12, atol=1e-12)


def test_copies_are_trained_with_the_same_scaler():
    model, x, y = problem()
    expected = oracle.contributions(model, F.cross_entropy, x, y)
    scaler = scaler_of()
    attach(model, *oracle.STATISTICS, grad_scaler=scaler)
    backpropagate(model, x, y, scaler)
    other = copy.deepcopy(model)
    other.zero_grad()
    scaler.update(SCALE / 4)
    backpropagate(other, x, y, scaler)
    stats = gradstats.attached(other)
    assert stats.loss_scale.scaler is scaler
    assert oracle.worst(oracle.errors(stats, expected)) <= 1e-12
    loaded = pickle.loads(pickle.dumps(other))
    loaded.zero_grad()
    stats = gradstats.attached(loaded)
    backpropagate(loaded, x, y, stats.loss_scale.scaler)
    assert oracle.worst(oracle.errors(stats, expected)) <= 1e-12


def test_unfreezing_after_attach():
    model, x, y = problem()
    expected = oracle.contributions(model, F.cross_entropy, x, y)
    model[0].requires_grad_(False)
    scaler = scaler_of()
    stats = attach(model, *oracle.STATISTICS, grad_scaler=scaler)
    backpropagate(model, x, y, scaler)
    model.zero_grad()
    model[0].requires_grad_(True)
    backpropagate(model, x, y, scaler)
    assert oracle.worst(oracle.errors(stats, expected)) <= 1e-12


def test_detach_takes_all_hooks_off():
    model, x, y = problem()
    scaler = scaler_of()
    with attach(model, grad_scaler=scaler):
        backpropagate(model, x, y, scaler)
    assert not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in model.parameters())


def test_gradient_taken_away_by_a_hook():
    model, x, y = problem()
    model[0].weight.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    scaler = scaler_of()
    stats = attach(model, grad_scaler=scaler)
    backpropagate(model, x, y, scaler, B)
    with pytest.raises(LifetimeError, match="'0.weight' is not known.*Leave p.grad"):
        stats.second_moment["0.weight"]


@pytest.mark.parametrize(
    "change",
    [
        lambda model, scaler, optimizer: scaler.unscale_(optimizer),
        lambda model, scaler, optimizer: model[0].weight.grad.data.mul_(0.5),
    ],
)
def test_unscaled_without_naming_the_scaler_is_refused(change):
    model, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(6, 4)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    stats = gradstats.attach(model, "variance", "second_moment")
    scaler.scale(model(x).square().mean()).backward()
    assert torch.isfinite(stats.variance["0.weight"]).all()
    change(model, scaler, optimizer)
    with pytest.raises(gradstats.LifetimeError, match="grad_scaler=scaler"):
        stats.variance["0.weight"]


def test_autocast_around_the_forward_is_left_as_it_was():
    """Accelerate's: one autocast object on the instance's forward, which a probe within the call would enter twice."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    stats = attach(model)
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    for _ in range(3):
        model.zero_grad()
        model(torch.randn(5, 3)).float().square().mean().backward()
        assert not torch.is_autocast_enabled("cpu")
    assert stats.second_moment["0.weight"].dtype == torch.float32
