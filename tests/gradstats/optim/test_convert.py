"""Optimizers converted in the middle of a run go on as if they had not been."""

import copy

import pytest
import torch
from torch import nn

from gradstats import GradstatsError, attach
from gradstats.optim import (
    BatchInvariantAdam,
    BatchInvariantLion,
    BatchInvariantRMSprop,
    BatchInvariantSGD,
    from_torch,
    to_torch,
)
from tests.gradstats.optim.problem import problem, train, vector

D = torch.float64
B = 16

ADAM, ADAMW, SGD, RMSPROP = torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop
BETAS = {"lr": 0.01, "betas": (0.8, 0.95)}
THEIRS = [
    (ADAM, BETAS),
    (ADAM, BETAS | {"weight_decay": 0.1, "eps": 0.01, "maximize": True}),
    (ADAM, BETAS | {"amsgrad": True}),
    (ADAMW, BETAS | {"weight_decay": 0.1}),
    (ADAMW, BETAS | {"amsgrad": True, "fused": True}),
    (SGD, {"lr": 0.1}),
    (SGD, {"lr": 0.1, "weight_decay": 0.1}),
    (SGD, {"lr": 0.001, "momentum": 0.9, "weight_decay": 0.01, "maximize": True}),
    (SGD, {"lr": 0.05, "momentum": 0.9, "dampening": 0.5}),
    (SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
    (RMSPROP, {"lr": 0.001}),
    (RMSPROP, {"lr": 0.001, "alpha": 0.9, "momentum": 0.8, "weight_decay": 0.1, "eps": 0.01}),
    (RMSPROP, {"lr": 0.001, "centered": True, "eps": 0.01}),
    (RMSPROP, {"lr": 0.001, "centered": True, "momentum": 0.8, "eps": 0.01, "maximize": True}),
]
every = pytest.mark.parametrize(("kind", "options"), THEIRS, ids=lambda value: getattr(value, "__name__", str(value)))


def trained(kind, options, steps):
    """A model and its optimizer in the middle of training; two groups, of which one has a larger lr."""
    model, x, y = problem()
    groups = [{"params": model[0].parameters(), "name": "first"}, {"params": [*model[2:].parameters()]}]
    groups[0]["lr"] = 1.5 * options["lr"]
    optimizer = kind(groups, **options)
    train(model, optimizer, x, y, [B] * steps)
    return model, optimizer, x, y


def copies(model, optimizer):
    return copy.deepcopy((model, optimizer))


@every
@pytest.mark.parametrize("steps", [0, 8])
def test_from_torch_goes_on_as_torch_does(kind, options, steps):
    model, optimizer, x, y = trained(kind, options, steps)
    theirs, their_optimizer = copies(model, optimizer)
    attach(model)
    converted = from_torch(optimizer, B)
    ours = train(model, converted, x, y, [B] * 10)
    assert (ours - train(theirs, their_optimizer, x, y, [B] * 10)).abs().max() <= 1e-10
    assert converted.param_groups[0]["name"] == "first"
    if kind is not SGD:
        assert converted.examples == B * (steps + 10)


@every
def test_to_torch_goes_on_as_ours_does(kind, options):
    model, optimizer, x, y = trained(kind, options, 0)
    attach(model)
    optimizer = from_torch(optimizer, B)
    train(model, optimizer, x, y, [B] * 8)
    theirs, _ = copies(model, None)
    converted = to_torch(optimizer, B)
    expected = train(model, optimizer, x, y, [B] * 10)
    assert type(converted) is kind
    moved = rebound(converted, model, theirs)
    assert (train(theirs, moved, x, y, [B] * 10) - expected).abs().max() <= 1e-10


def rebound(optimizer, model, other):
    """The optimizer with the parameters of a copy of the model in place of its own."""
    twin = {id(p): q for p, q in zip(model.parameters(), other.parameters(), strict=True)}
    groups = [group | {"params": [twin[id(p)] for p in group["params"]]} for group in optimizer.param_groups]
    moved = type(optimizer)(groups, lr=0.0)
    moved.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return moved


@every
def test_there_and_back_is_the_identity(kind, options):
    _, optimizer, _, _ = trained(kind, options, 7)
    back = to_torch(from_torch(optimizer, B), B)
    assert type(back) is kind
    for group, other in zip(optimizer.param_groups, back.param_groups, strict=True):
        assert group | {"fused": None} == other | {"fused": None}  # how it is computed is not kept
        for p in group["params"]:
            before = {name: value for name, value in optimizer.state[p].items() if value is not None}
            assert before.keys() == back.state[p].keys()
            for name, value in before.items():
                torch.testing.assert_close(back.state[p][name], value, rtol=1e-14, atol=0)
                assert back.state[p][name] is not value


TUNED = [
    (BatchInvariantAdam, BETAS | {"source": "squared_batch_mean", "weight_decay": 0.1}),
    (BatchInvariantAdam, BETAS | {"source": "squared_batch_mean", "amsgrad": True}),
    (BatchInvariantAdam, BETAS | {"source": "squared_batch_mean", "denominator": "slides", "eps": 0.1}),
    (BatchInvariantSGD, {"lr": 0.1, "weight_decay": 0.1}),
    (BatchInvariantSGD, {"lr": 0.1, "momentum": 0.8, "weight_decay": 0.1, "decoupled_weight_decay": False}),
    (BatchInvariantSGD, {"lr": 0.1, "momentum": 0.8, "average": "ewma", "dampening": 0.5}),
    (BatchInvariantRMSprop, {"lr": 0.01, "source": "squared_batch_mean", "momentum": 0.8, "eps": 0.1}),
    (BatchInvariantRMSprop, {"lr": 0.01, "source": "squared_batch_mean", "centered": True, "eps": 0.1}),
]


@pytest.mark.parametrize(("kind", "options"), TUNED, ids=lambda value: getattr(value, "__name__", str(value)))
def test_to_torch_is_exact_at_any_batch_size_where_noise_is_not_asked(kind, options):
    model, x, y = problem()
    attach(model)
    optimizer = kind(model.parameters(), batch_size=4, **options)
    train(model, optimizer, x, y, [B] * 20)
    theirs, _ = copies(model, None)
    converted = rebound(to_torch(optimizer, B), model, theirs)
    expected = train(model, optimizer, x, y, [B] * 10)
    assert (train(theirs, converted, x, y, [B] * 10) - expected).abs().max() <= 1e-10


def test_elsewhere_it_is_the_square_root_rule():
    optimizer = BatchInvariantAdam(nn.Linear(2, 2).parameters(), 1e-3, (0.9, 0.99), 1e-8, batch_size=16)
    group = to_torch(optimizer, 64).param_groups[0]
    assert group["lr"] == pytest.approx(2e-3)
    assert group["eps"] == pytest.approx(5e-9)
    assert group["betas"] == pytest.approx((0.9**4, 0.99**4))
    group = optimizer.to_torch(4).param_groups[0]
    assert group["lr"] == pytest.approx(5e-4)
    optimizer = BatchInvariantRMSprop(nn.Linear(2, 2).parameters(), 1e-3, 0.9, 1e-8, batch_size=16)
    group = to_torch(optimizer, 64).param_groups[0]
    assert (group["lr"], group["eps"], group["alpha"]) == pytest.approx((2e-3, 5e-9, 0.9**4))


def test_weights_that_are_linear_in_the_batch_size():
    optimizer = BatchInvariantAdam(nn.Linear(2, 2).parameters(), betas=(0.9, 0.99), batch_size=16, average="slides")
    assert to_torch(optimizer, 64).param_groups[0]["betas"] == pytest.approx((0.6, 0.96))
    assert to_torch(optimizer, 1024).param_groups[0]["betas"] == pytest.approx((0.0, 0.36))


def test_decay_without_a_learning_rate():
    optimizer = BatchInvariantAdam(nn.Linear(2, 2).parameters(), lr=0.0, weight_decay=0.1, batch_size=16)
    assert to_torch(optimizer, 64).param_groups[0]["weight_decay"] == 0.1


@pytest.mark.parametrize(("options", "s"), [({"reference_batch_size": 64}, 2.0), ({"source": "variance"}, 0.0)])
def test_the_second_moment_is_floored(options, s):
    model, x, y = problem()
    attach(model)
    optimizer = BatchInvariantAdam(model.parameters(), batch_size=B, betas=(0.9, 0.0), **options)
    train(model, optimizer, x, y, [B])
    state = optimizer.state[model[0].weight]
    state["exp_avg_sq"].fill_(-1.0)
    if "exp_avg_q" in state:
        state["exp_avg_q"].fill_(2.0 * 64)
    theirs = to_torch(optimizer, 64).state[model[0].weight]["exp_avg_sq"]
    torch.testing.assert_close(theirs, torch.full_like(theirs, s))


@pytest.mark.parametrize("kind", [BatchInvariantAdam, BatchInvariantRMSprop])
@pytest.mark.parametrize("r", [1, 64])
def test_pure_noise_is_the_same_at_any_batch_size(kind, r):
    """Whichever R: s is sigma^2/R before, sigma^2/B after; the next step is as long."""
    torch.manual_seed(3)
    model = nn.Linear(1, 200, bias=False).to(D)
    attach(model)
    optimizer = kind(model.parameters(), lr=1e-3, batch_size=16, reference_batch_size=r)
    x = torch.randn(64, 1, dtype=D)
    x -= x.mean()
    for _ in range(3):
        model.zero_grad()
        model(x).mean().backward()
        optimizer.step()
    other = copy.deepcopy(model)
    theirs = rebound(to_torch(optimizer, 64), model, other)
    s = sum(state["exp_avg_sq"].sum() for state in optimizer.state.values())
    name = "exp_avg_sq" if kind is BatchInvariantAdam else "square_avg"
    t = sum(state[name].sum() for state in theirs.state.values())
    if kind is BatchInvariantAdam:
        t = t / (1 - theirs.param_groups[0]["betas"][1] ** 3)
    torch.testing.assert_close(t, s * r / 64, rtol=1e-9, atol=0)


@pytest.mark.parametrize(("kind", "r"), [(BatchInvariantSGD, {}), (BatchInvariantRMSprop, {"reference_batch_size": 1})])
def test_a_velocity_coasts_as_far(kind, r):
    """Without a gradient, at a batch size and an R of which neither is the tuned one."""
    model, x, y = problem()
    attach(model)
    optimizer = kind(model.parameters(), lr=0.01, momentum=0.5, batch_size=4, **r)
    train(model, optimizer, x, y, [B] * 3)
    theirs, _ = copies(model, None)
    converted = rebound(to_torch(optimizer, B), model, theirs)
    for p in theirs.parameters():
        p.grad = torch.zeros_like(p)
    converted.step()
    before = vector(model)
    model.zero_grad()
    (0 * model(x[:B])).mean().backward()
    optimizer.step()
    torch.testing.assert_close(vector(theirs), vector(model), rtol=1e-12, atol=1e-14)
    assert (vector(model) - before).abs().max() > 1e-4


def test_only_the_variance_of_a_centered_second_moment_scales():
    model, x, y = problem()
    attach(model)
    optimizer = BatchInvariantRMSprop(model.parameters(), centered=True, batch_size=4, reference_batch_size=1)
    train(model, optimizer, x, y, [B] * 3)
    converted = to_torch(optimizer, B)
    for p in model.parameters():
        ours, theirs = optimizer.state[p], converted.state[p]
        variance = (ours["exp_avg_sq"] - ours["exp_avg"].square()) / B
        torch.testing.assert_close(theirs["square_avg"] - theirs["grad_avg"].square(), variance, rtol=1e-8, atol=1e-16)


def test_all_averages_are_of_one_age():
    model, optimizer, _, _ = trained(RMSPROP, {"lr": 0.001, "centered": True}, 3)
    state = from_torch(optimizer, B).state[model[0].weight]
    assert state["step"] == state["exp_avg_step"] == 3 * B and not state["step"].is_floating_point()


def test_state_is_kept_in_float32():
    model, x, y = problem(torch.bfloat16)
    optimizer = ADAM(model.parameters(), lr=0.01)
    train(model, optimizer, x, y, [B])
    attach(model)
    ours = from_torch(optimizer, B)
    p = model[0].weight
    assert ours.state[p]["exp_avg"].dtype == torch.float32
    assert to_torch(ours, B).state[p]["exp_avg"].dtype == torch.bfloat16


def test_a_tensor_lr_stays_one():
    model, x, y = problem()
    theirs, _ = copies(model, None)
    ours = from_torch(ADAMW(model.parameters(), lr=torch.tensor(0.01, dtype=D)), B)
    expected = ADAMW(theirs.parameters(), lr=0.01)
    attach(model)
    difference = train(model, ours, x, y, [B] * 5) - train(theirs, expected, x, y, [B] * 5)
    assert difference.abs().max() <= 1e-10
    back = to_torch(ours, 4 * B).param_groups[0]
    assert back["lr"] == torch.tensor(0.02, dtype=D) and back["weight_decay"] == pytest.approx(0.02, rel=1e-3)


def test_added_groups_have_the_options_of_the_first():
    model, _, _ = problem()
    optimizer = from_torch(ADAM(model[0].parameters(), lr=0.123, betas=(0.5, 0.6)), B, max_norm=3.0)
    optimizer.add_param_group({"params": model[3].parameters()})
    group = optimizer.param_groups[1]
    assert (group["lr"], group["betas"], group["batch_size"], group["max_norm"]) == (0.123, (0.5, 0.6), B, 3.0)


def test_a_scheduler_made_anew_goes_on():
    model, optimizer, _, _ = trained(ADAM, BETAS, 0)
    torch.optim.lr_scheduler.StepLR(optimizer, 5)
    attach(model)
    ours = from_torch(optimizer, 4)
    assert [group["initial_lr"] for group in ours.param_groups] == [0.015, 0.01]
    assert [group["initial_lr"] for group in to_torch(ours, B).param_groups] == pytest.approx([0.03, 0.02])


def test_options_before_the_first_step():
    model, optimizer, x, y = trained(ADAM, BETAS, 0)
    assert from_torch(optimizer, B, reference_batch_size=1).param_groups[1]["reference_batch_size"] == 1
    train(model, optimizer, x, y, [B])
    with pytest.raises(GradstatsError, match="reference_batch_size changes the trajectory"):
        from_torch(optimizer, B, reference_batch_size=1)
    with pytest.raises(GradstatsError, match="lr is taken from the optimizer"):
        from_torch(optimizer, B, lr=1.0)


@pytest.mark.parametrize(
    ("kind", "options", "match"),
    [
        (torch.optim.NAdam, {}, "counterpart of NAdam"),
        (ADAM, {"capturable": True}, "capturable=True"),
        (SGD, {"differentiable": True}, "differentiable=True"),
        (SGD, {"momentum": 1.5}, "momentum = 1.5"),
        (RMSPROP, {"alpha": 1.0}, "alpha = 1.0"),
    ],
)
def test_what_cannot_be_kept_is_refused(kind, options, match):
    with pytest.raises(GradstatsError, match=match):
        from_torch(kind(nn.Linear(2, 2).parameters(), lr=0.1, **options), B)


@pytest.mark.parametrize(
    ("kind", "options", "match"),
    [
        (BatchInvariantLion, {}, "counterpart of BatchInvariantLion"),
        (BatchInvariantAdam, {"max_norm": 1.0}, "max_norm = 1.0"),
        (BatchInvariantAdam, {"average": "mean"}, "average = 'mean'"),
        (BatchInvariantAdam, {"source": "mean_square"}, "R = inf"),
        (BatchInvariantSGD, {"momentum": 0.9, "weight_decay": 0.1}, "SGD with momentum has no decoupled"),
        (BatchInvariantRMSprop, {"weight_decay": 0.1}, "RMSprop has no decoupled"),
        (BatchInvariantRMSprop, {"exponent": 1}, "exponent = 1"),
        (BatchInvariantRMSprop, {"eps_inside": True}, "eps_inside = True"),
    ],
)
def test_what_torch_has_not_is_refused(kind, options, match):
    optimizer = kind(nn.Linear(2, 2).parameters(), batch_size=B, **options)
    with pytest.raises(GradstatsError, match=match):
        to_torch(optimizer, B)


def test_state_that_was_only_allocated_is_none():
    """torch's first batch has no dampening."""
    model = nn.Linear(2, 2)
    optimizer = BatchInvariantSGD(model.parameters(), lr=0.0, momentum=0.9, batch_size=B)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert "momentum_buffer" in optimizer.state[model.weight]
    assert not to_torch(optimizer, B).state


def test_what_torch_has_not_can_be_given_up():
    optimizer = BatchInvariantAdam(nn.Linear(2, 2).parameters(), lr=0.1, batch_size=B, max_norm=1.0)
    optimizer.param_groups[0]["max_norm"] = None
    converted = optimizer.to_torch(B)
    converted.add_param_group({"params": nn.Linear(2, 2).parameters()})
    assert converted.param_groups[1]["lr"] == 0.1
