"""Clipping that statistics follow: said with `stats.clip_grad_norm_`, or recognised with follow_clipping=True."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gradstats import LifetimeError, attach, attached
from gradstats.gradient import COLUMNS
from gradstats.optim import BatchInvariantAdam
from gradstats.statistics import STATISTICS
from tests import oracle

D = torch.float64
B = 6
MAX_NORM = 0.05
SCALE = 2.0**14
OPTIONS = {
    "fused": {},
    "vmap": {"engine": "vmap"},
    "opacus": {"engine": "opacus"},
    "microbatch": {"engine": "microbatch", "granularity": "microbatch", "microbatch_size": 3},
}
POWERS = {  # of f in each statistic; counts stay, and their edges move
    "second_moment": 2,
    "variance": 2,
    "norms": 1,
    "sign_mean": 0,
    "abs_mean": 1,
    "max_abs": 1,
    "snr": 0,
    "noise_scale": (2, 2),
    "histogram": (0, 1, 0),
    "projection": 1,
    "gram": 2,
    "cosine_similarity": 0,
}

# Opacus' full backward hooks warn when the input of the first layer needs no gradient.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")


def problem(dtype=D):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)
    return model, torch.randn(B, 5, dtype=dtype), torch.randint(0, 3, (B,))


def backpropagate(model, x, y, size=3, scaler=None):
    for start in range(0, B, size):
        rows = slice(start, start + size)
        loss = F.cross_entropy(model(x[rows]), y[rows]) * size / B
        (scaler.scale(loss) if scaler is not None else loss).backward()


def said(stats, model):
    return stats.clip_grad_norm_(MAX_NORM)


def recognised(stats, model):
    return nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)


WAYS = [(said, {}), (said, {"follow_clipping": True}), (recognised, {"follow_clipping": True})]


def everything(stats, names):
    found = {}
    for name in names:
        entries = dict(stats.read(name))
        if stats.read(name).has_total:
            entries["total"] = stats.read(name).total
        found |= {(name, key): value if isinstance(value, tuple) else (value,) for key, value in entries.items()}
    return found


def same(found, expected, f=1.0, tolerance=1e-10):
    assert found.keys() == expected.keys()
    for (name, key), values in expected.items():
        powers = POWERS[name] if isinstance(POWERS[name], tuple) else (POWERS[name],)
        for value, before, power in zip(found[name, key], values, powers, strict=True):
            torch.testing.assert_close(value, before * f**power, rtol=tolerance, atol=tolerance * MAX_NORM**2)


def test_table_of_powers_is_complete():
    assert POWERS.keys() == STATISTICS.keys()


@pytest.mark.parametrize(("clip", "attachment"), WAYS)
@pytest.mark.parametrize("engine", OPTIONS)
def test_statistics_are_those_of_the_clipped_gradient(engine, clip, attachment):
    """At every moment from the backward passes to the next ones; these are over another number of them, so that p.grad
    is where it was, and has been written to as often."""
    menu = [name for name in STATISTICS if name not in ("gram", "cosine_similarity")]
    model, x, y = problem()
    stats = attach(model, *menu, **OPTIONS[engine], **attachment)
    backpropagate(model, x, y)
    expected = everything(stats, menu)
    gradients = [p.grad.clone() for p in model.parameters()]
    norm = float(torch.cat([g.flatten() for g in gradients]).norm())
    f = MAX_NORM / (norm + 1e-6)
    assert f < 0.9
    assert abs(float(clip(stats, model)) - norm) <= 1e-12
    for p, g in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, f * g, rtol=1e-12, atol=0)
    same(everything(stats, menu), expected, f)
    clip(stats, model)  # at the bound: the factor is 1 but for the 1e-6
    same(everything(stats, menu), expected, f, tolerance=1e-4)
    model.zero_grad()
    without = [name for name in menu if not STATISTICS[name].needs_gradient]
    kept = {key: value for key, value in expected.items() if key[0] in without}
    same(everything(stats, without), kept, f, tolerance=1e-4)
    if engine != "microbatch":
        backpropagate(model, x, y, size=2)
        found = everything(stats, menu)
        same(found, expected)


@pytest.mark.parametrize(("clip", "attachment"), WAYS)
def test_pairs_of_examples(clip, attachment):
    model, x, y = problem()
    pairs = ("gram", "cosine_similarity")
    stats = attach(model, *pairs, **attachment)
    backpropagate(model, x, y, B)
    expected = everything(stats, pairs)
    f = MAX_NORM / (float(clip(stats, model)) + 1e-6)
    same(everything(stats, pairs), expected, f)


def test_a_norm_below_the_bound_changes_nothing():
    model, x, y = problem()
    stats = attach(model, "variance")
    backpropagate(model, x, y)
    expected = everything(stats, ["variance"])
    stats.clip_grad_norm_(1e6)
    for found, before in zip(everything(stats, ["variance"]).values(), expected.values(), strict=True):
        assert torch.equal(found[0], before[0])


@pytest.mark.parametrize(("clip", "attachment"), WAYS)
@pytest.mark.parametrize("reference", [1, 4, 16])
def test_optimizer_takes_the_step_of_the_scaled_loss(reference, clip, attachment):
    model, x, y = problem()
    twin = copy.deepcopy(model)
    stats = attach(model, **attachment)
    attach(twin)
    optimizers = [
        BatchInvariantAdam(m.parameters(), lr=0.02, eps=1e-3, batch_size=16, reference_batch_size=reference)
        for m in (model, twin)
    ]
    for _ in range(10):
        backpropagate(model, x, y)
        f = min(1.0, MAX_NORM / (float(clip(stats, model)) + 1e-6))
        for rows in (slice(0, 3), slice(3, 6)):
            (f * F.cross_entropy(twin(x[rows]), y[rows]) / 2).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert optimizers[0].examples == 10 * B
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert (p - q).abs().max() <= 1e-10


def test_multiplication_by_one_is_followed():
    """As a trainer that only wants to log the norm."""
    model, x, y = problem()
    expected = oracle.contributions(model, F.cross_entropy, x, y)
    stats = attach(model, *oracle.STATISTICS, follow_clipping=True)
    backpropagate(model, x, y)
    nn.utils.clip_grad_norm_(model.parameters(), float("inf"))
    assert stats.window("0.weight", ["sum_of_squares"]).factor == 1
    assert oracle.exact(stats, expected)


def masked(p):
    p.grad[0] = 0


CHANGES = {
    "a mask": lambda ps: masked(ps[0]),
    "one entry": lambda ps: ps[0].grad.view(-1)[3].zero_(),
    "one parameter": lambda ps: ps[0].grad.mul_(0.999),
    "one parameter zeroed": lambda ps: ps[0].grad.zero_(),
    "a sign": lambda ps: ps[0].grad.neg_(),
    "all signs": lambda ps: [p.grad.neg_() for p in ps],
    "signs of rows": lambda ps: ps[0].grad[1:3].neg_(),
    "rows exchanged": lambda ps: ps[0].grad.copy_(ps[0].grad.flip(0)),
    "noise": lambda ps: ps[0].grad.add_(torch.randn_like(ps[0]) * 1e-4 * ps[0].grad.norm()),
    "values": lambda ps: nn.utils.clip_grad_value_(ps, float(ps[0].grad.abs().max()) / 2),
    "parameter by parameter": lambda ps: [nn.utils.clip_grad_norm_([p], 1e-2) for p in ps],
    "centred": lambda ps: ps[0].grad.sub_(ps[0].grad.mean(0)),
    "weight decay": lambda ps: [p.grad.add_(p, alpha=0.1) for p in ps],
}


@pytest.mark.parametrize("dtype", [torch.float32, D])
@pytest.mark.parametrize("change", CHANGES)
def test_any_other_change_is_refused(change, dtype):
    model, x, y = problem(dtype)
    stats = attach(model, "second_moment", "variance", follow_clipping=True)
    optimizer = BatchInvariantAdam(model.parameters(), batch_size=16)
    backpropagate(model, x, y)
    CHANGES[change](list(model.parameters()))
    who = r"'0.weight' \(7, 5\) was changed.*max_norm" if change != "parameter by parameter" else "was changed"
    for read in (lambda: stats.second_moment["0.weight"], lambda: stats.variance["0.weight"], optimizer.step):
        with pytest.raises(LifetimeError, match=who):
            read()


@pytest.mark.parametrize(
    "change", ["a mask", "one entry", "signs of rows", "a sign", "rows exchanged", "values", "noise"]
)
def test_a_model_of_one_parameter(change):
    """No other gradient to disagree with."""
    torch.manual_seed(0)
    model = nn.Linear(COLUMNS, 7, bias=False)  # a row of the weight is one of the fingerprint
    stats = attach(model, follow_clipping=True)
    model(torch.randn(B, COLUMNS)).square().mean().backward()
    CHANGES[change]([model.weight])
    with pytest.raises(LifetimeError, match="'weight'"):
        stats.second_moment["weight"]


def test_without_following_the_message_names_the_ways_out():
    model, x, y = problem()
    stats = attach(model, "variance")
    backpropagate(model, x, y)
    nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
    ways = r"'0.weight' was changed in place.*max_norm.*stats.clip_grad_norm_.*follow_clipping=True.*grad_scaler"
    with pytest.raises(LifetimeError, match=ways):
        stats.variance["0.weight"]
    with pytest.raises(LifetimeError, match=r"'0.weight' was changed.*before stats.clip_grad_norm_"):
        stats.clip_grad_norm_(MAX_NORM)


@pytest.mark.parametrize(("clip", "attachment"), WAYS)
@pytest.mark.parametrize("engine", OPTIONS)
def test_accumulating_onto_a_clipped_gradient_is_refused(engine, clip, attachment):
    model, x, y = problem()
    stats = attach(model, **OPTIONS[engine], **attachment)
    backpropagate(model, x, y)
    clip(stats, model)
    backpropagate(model, x, y)
    with pytest.raises(LifetimeError, match="'0.weight'.*between two backward passes"):
        stats.second_moment["0.weight"]
    model.zero_grad()
    backpropagate(model, x, y)
    assert stats.second_moment["0.weight"].isfinite().all()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zeroed_gradients_do_not_tell_whether_they_were_clipped(set_to_none):
    model, x, y = problem()
    stats = attach(model, follow_clipping=True)
    backpropagate(model, x, y)
    expected = stats.second_moment["0.weight"]
    f = MAX_NORM / (float(nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)) + 1e-6)
    BatchInvariantAdam(model.parameters(), lr=0.0, batch_size=16).step()
    model.zero_grad(set_to_none)
    torch.testing.assert_close(stats.second_moment["0.weight"], f**2 * expected, rtol=1e-10, atol=0)
    backpropagate(model, x, y)
    nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
    model.zero_grad(set_to_none)
    with pytest.raises(LifetimeError, match=r"'0.weight' was zeroed before anything was read.*zero_grad"):
        stats.second_moment["0.weight"]


class Partly(nn.Module):
    """A frozen layer, one that is used at first only, and one whose gradient is zero."""

    def __init__(self):
        super().__init__()
        self.frozen, self.used, self.at_first = nn.Linear(5, 5), nn.Linear(5, 3), nn.Linear(5, 3)
        self.dead = nn.Linear(3, 3)
        self.frozen.requires_grad_(False)
        self.first = True

    def forward(self, x):
        h = self.used(self.frozen(x)) + (self.at_first(x) if self.first else 0)
        return h + 0.0 * self.dead(h)


@pytest.mark.parametrize(("clip", "attachment"), WAYS)
@pytest.mark.parametrize("set_to_none", [True, False])
def test_parameters_without_gradient(clip, attachment, set_to_none):
    torch.manual_seed(0)
    model = Partly().double()
    stats = attach(model, **attachment)
    for _ in range(2):
        model.zero_grad(set_to_none)
        model(torch.randn(B, 5, dtype=D)).square().sum(-1).mean().backward()
        expected = stats.second_moment["used.weight"]
        f = MAX_NORM / (float(clip(stats, model)) + 1e-6)
        torch.testing.assert_close(stats.second_moment["used.weight"], f**2 * expected, rtol=1e-10, atol=0)
        assert not stats.second_moment["dead.weight"].any()
        model.first = False


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounding_is_no_other_change(dtype):
    """A long vector and a table of a million numbers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(1000, 1000), nn.Linear(1000, 3), nn.LayerNorm(3)).to(dtype)
    stats = attach(model, follow_clipping=True)
    for i in range(5):
        model.zero_grad()
        (model(torch.randint(0, 1000, (B,))) * torch.randn(B, 3).to(dtype)).float().mean().backward()
        whole = float(stats.second_moment["0.weight"].double().sum())
        f = (i + 1) / 7
        torch._foreach_mul_([p.grad for p in model.parameters()], f)
        found = float(stats.second_moment["0.weight"].double().sum())
        assert abs(found / whole / f**2 - 1) <= 2 * torch.finfo(dtype).eps


def test_gradients_that_are_not_finite():
    model, x, y = problem()
    stats = attach(model, follow_clipping=True)
    x[2] = torch.inf
    backpropagate(model, x, y)
    nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
    assert stats.second_moment["0.weight"].isnan().any()


def test_a_copy_follows_too():
    model, x, y = problem()
    attach(model, follow_clipping=True)
    other = copy.deepcopy(model)
    stats = attached(other)
    backpropagate(other, x, y)
    expected = stats.second_moment["0.weight"]
    f = MAX_NORM / (float(nn.utils.clip_grad_norm_(other.parameters(), MAX_NORM)) + 1e-6)
    torch.testing.assert_close(stats.second_moment["0.weight"], f**2 * expected, rtol=1e-10, atol=0)


# GradScaler


def scaled(attachment, statistics=("second_moment", "variance", "norms")):
    model, x, y = problem()
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    optimizer = BatchInvariantAdam(model.parameters(), lr=0.02, eps=1e-3, batch_size=16)
    return attach(model, *statistics, grad_scaler=scaler, **attachment), model, x, y, scaler, optimizer


@pytest.mark.parametrize(("clip", "attachment"), WAYS)
def test_unscaled_then_clipped(clip, attachment):
    """Read at every moment, and stepped as without a scaler."""
    stats, model, x, y, scaler, optimizer = scaled(attachment)
    twin = copy.deepcopy(model)
    attached(twin).detach()
    their_stats = attach(twin, **attachment)
    theirs = BatchInvariantAdam(twin.parameters(), lr=0.02, eps=1e-3, batch_size=16)
    for _ in range(3):
        backpropagate(model, x, y, scaler=scaler)
        expected = everything(stats, oracle.STATISTICS)
        scaler.unscale_(optimizer)
        same(everything(stats, oracle.STATISTICS), expected)
        f = MAX_NORM / (float(clip(stats, model)) + 1e-6)
        same(everything(stats, oracle.STATISTICS), expected, f)
        scaler.step(optimizer)
        scaler.update()
        same(everything(stats, oracle.STATISTICS), expected, f)
        optimizer.zero_grad()
        backpropagate(twin, x, y)
        clip(their_stats, twin)
        theirs.step()
        theirs.zero_grad()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert (p - q).abs().max() <= 1e-10


@pytest.mark.parametrize(("clip", "attachment"), WAYS)
def test_gradients_that_cancel_are_unscaled_with_the_others(clip, attachment):
    """Of the first parameter, all that p.grad shows is zeros."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(1, 1)).double()
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    stats = attach(model, "second_moment", "variance", grad_scaler=scaler, **attachment)
    optimizer = BatchInvariantAdam(model.parameters(), batch_size=1)
    x = torch.tensor([[1.0, 2.0], [-1.0, -2.0]], dtype=D)
    scaler.scale(1000 * model(x).mean()).backward()
    assert not model[0].weight.grad.any()
    q, s2 = (read["0.weight"] for read in (stats.second_moment, stats.variance))
    scaler.unscale_(optimizer)
    f = MAX_NORM / (float(clip(stats, model)) + 1e-6)
    scaler.step(optimizer)
    for found, before in (
        (optimizer.state[model[0].weight]["exp_avg_sq"], q),
        (stats.second_moment["0.weight"], q),
        (stats.variance["0.weight"], s2),
    ):
        torch.testing.assert_close(found, f**2 * before, rtol=1e-10, atol=0)


def test_clipping_what_still_carries_the_scale():
    stats, model, x, y, scaler, optimizer = scaled({})
    backpropagate(model, x, y, scaler=scaler)
    with pytest.raises(LifetimeError, match=r"'0.weight' still carries the loss scale.*unscale_"):
        stats.clip_grad_norm_(MAX_NORM)
    scaler.unscale_(optimizer)
    stats.clip_grad_norm_(2 * MAX_NORM)
    stats.clip_grad_norm_(MAX_NORM)  # once unscaled, it stays so
    assert stats.variance["0.weight"].isfinite().all()


@pytest.mark.parametrize("max_norm", [SCALE * MAX_NORM, MAX_NORM / SCALE])
def test_scaled_gradient_clipped_by_others(max_norm):
    """The step is the same as that of a loss multiplied by the same factor, however small."""
    _, model, x, y, scaler, optimizer = scaled({"follow_clipping": True})
    twin = copy.deepcopy(model)
    attached(twin).detach()
    attach(twin)
    theirs = BatchInvariantAdam(twin.parameters(), lr=0.02, eps=1e-3, batch_size=16)
    backpropagate(model, x, y, scaler=scaler)
    f = max_norm / (float(nn.utils.clip_grad_norm_(model.parameters(), max_norm)) + 1e-6)
    (f * F.cross_entropy(twin(x), y)).backward()
    scaler.step(optimizer)
    theirs.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert (p - q).abs().max() <= 1e-10


@pytest.mark.parametrize(("clip", "attachment"), WAYS)
def test_steps_whose_gradients_overflow_are_skipped(clip, attachment):
    stats, model, x, y, scaler, optimizer = scaled(attachment)
    before = copy.deepcopy(model.state_dict())
    x[2] = torch.inf
    backpropagate(model, x, y, scaler=scaler)
    scaler.unscale_(optimizer)
    clip(stats, model)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == SCALE / 2
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_unscaled_then_multiplied_by_others():
    """As by those who divide by the number of tokens themselves."""
    stats, model, x, y, scaler, optimizer = scaled({"follow_clipping": True})
    backpropagate(model, x, y, scaler=scaler)
    expected = everything(stats, oracle.STATISTICS)
    scaler.unscale_(optimizer)
    torch._foreach_mul_([p.grad for p in model.parameters()], 3.0)
    same(everything(stats, oracle.STATISTICS), expected, 3.0)


def test_changed_beside_clipping_under_a_scaler():
    stats, model, x, y, scaler, optimizer = scaled({"follow_clipping": True})
    backpropagate(model, x, y, scaler=scaler)
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
    assert stats.variance["0.weight"].isfinite().all()
    model[0].weight.grad.data.mul_(0.5)  # leaves no mark
    with pytest.raises(LifetimeError, match="'0.weight' was changed.*other than grad_scaler"):
        stats.variance["0.weight"]
