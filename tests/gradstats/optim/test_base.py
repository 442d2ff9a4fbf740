"""How an optimizer finds the batch size and the statistics of its parameters."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gradstats import GradstatsError, MissingStatistic, attach
from gradstats.optim import (
    BatchInvariantAdam,
    BatchInvariantLion,
    BatchInvariantRMSprop,
    BatchInvariantSGD,
    BatchInvariantSignSGD,
    QuenchingSGD,
    SaturatingAdam,
    SaturatingSGD,
)
from tests.gradstats.optim.problem import problem, train, vector

CLASSIC = {"lr": 0.01, "batch_size": 16, "source": "squared_batch_mean"}


def test_what_reads_no_statistics_needs_the_batch_size_only():
    model, x, y = problem()
    optimizer = BatchInvariantAdam(model.parameters(), **CLASSIC)
    with pytest.raises(MissingStatistic, match=r"attach\(model\).*step\(batch_size=\.\.\.\)"):
        train(model, optimizer, x, y, [8])
    assert int(optimizer.state[model[0].weight]["step"]) == 0
    alone = train(model, optimizer, x, y, [8], batch_size=8)
    attached, _, _ = problem()
    attach(attached, "norms")
    assert torch.equal(alone, train(attached, BatchInvariantAdam(attached.parameters(), **CLASSIC), x, y, [8]))


def test_a_batch_size_that_contradicts_the_statistics_is_refused():
    model, x, y = problem()
    attach(model)
    optimizer = BatchInvariantAdam(model.parameters(), **CLASSIC)
    with pytest.raises(GradstatsError, match=r"batch_size=4.*\[8\] examples"):
        train(model, optimizer, x, y, [8], batch_size=4)
    train(model, optimizer, x, y, [8], batch_size=8)


def test_ignored_parameters_take_the_batch_size_of_the_others():
    model, x, y = problem()
    attach(model, ignore=["3.bias"])
    groups = [{"params": list(model.parameters())[:-1]}, {"params": [model[3].bias], "source": "squared_batch_mean"}]
    optimizer = BatchInvariantAdam(groups, lr=0.01, batch_size=16)
    train(model, optimizer, x, y, [8, 32])
    assert int(optimizer.state[model[3].bias]["step"]) == 40
    torch_s, _, _ = problem()
    plain = BatchInvariantAdam(torch_s.parameters(), **CLASSIC)
    F.cross_entropy(torch_s(x[:8]), y[:8]).backward()
    plain.step(batch_size=8)
    assert plain.state[torch_s[3].bias]["exp_avg"].abs().sum() > 0


def test_statistics_of_nothing_are_no_batch_of_none():
    """A parameter that the backward pass did not reach, with a gradient set by hand."""
    model, x, y = problem()
    attach(model)
    optimizer = BatchInvariantAdam([model[0].weight], **CLASSIC)
    train(model, optimizer, x, y, [8])
    model.zero_grad()
    model[3](torch.ones(4, 8, dtype=x.dtype)).sum().backward()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    with pytest.raises(MissingStatistic, match="batch size behind the gradient"):
        optimizer.step()


def test_groups_count_examples():
    model, x, y = problem()
    attach(model)
    optimizer = BatchInvariantAdam(
        [{"params": model[0].parameters()}, {"params": model[3].parameters()}], batch_size=16
    )
    model[3].requires_grad_(False)
    train(model, optimizer, x, y, [8, 4])
    assert [group["examples"] for group in optimizer.param_groups] == [12, 0] and optimizer.examples == 12
    restored = BatchInvariantAdam([{"params": model[0].parameters()}, {"params": model[3].parameters()}], batch_size=16)
    restored.load_state_dict(optimizer.state_dict())
    assert restored.examples == 12


def test_options_that_an_older_state_dict_lacks_are_the_defaults():
    model, x, y = problem()
    attach(model)
    optimizer = BatchInvariantAdam(model.parameters(), batch_size=16)
    train(model, optimizer, x, y, [8])
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        del group["amsgrad"], group["examples"]
    restored = BatchInvariantAdam(model.parameters(), batch_size=16)
    restored.load_state_dict(state)
    assert restored.param_groups[0]["amsgrad"] is False
    train(model, restored, x, y, [8])


def scaler_of():
    return torch.amp.GradScaler("cpu", init_scale=2.0**10)


@pytest.mark.parametrize("r", [1, 4])
def test_unscaled_gradients_go_with_squares_of_a_named_scaler(r):
    results = []
    for scaled in (False, True):
        model, x, y = problem()
        scaler = scaler_of()
        attach(model, **({"grad_scaler": scaler} if scaled else {}))
        optimizer = BatchInvariantAdam(model.parameters(), lr=0.01, batch_size=16, reference_batch_size=r)
        for i in range(3):
            rows = slice(8 * i, 8 * i + 8)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x[rows]), y[rows])
            if scaled:
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                scaler.step(optimizer)
                scaler.update(2.0**12)  # it changes between the steps
            else:
                loss.backward()
                optimizer.step()
        results.append(vector(model))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_unscaled_gradients_are_enough_where_no_squares_are_read():
    results = []
    for scaled in (False, True):
        model, x, y = problem()
        scaler, optimizer = scaler_of(), BatchInvariantAdam(model.parameters(), **CLASSIC)
        loss = F.cross_entropy(model(x[:8]), y[:8])
        if scaled:
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer, batch_size=8)
        else:
            loss.backward()
            optimizer.step(batch_size=8)
        results.append(vector(model))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_a_frozen_option_is_checked_when_loaded():
    model = nn.Linear(2, 2)
    state = BatchInvariantAdam(model.parameters()).state_dict()
    state["param_groups"][0]["average"] = "exponential"
    with pytest.raises(GradstatsError, match="debiased_ewma"):
        BatchInvariantAdam(model.parameters()).load_state_dict(state)


def test_ignored_parameters_take_the_loss_reduction_of_the_others():
    results = []
    for reduction in ("mean", "sum"):
        model, x, y = problem()
        attach(model, ignore=["0.weight"], loss_reduction=reduction)
        optimizer = BatchInvariantSGD(model.parameters(), lr=0.1, batch_size=8)
        F.cross_entropy(model(x[:8]), y[:8], reduction=reduction).backward()
        optimizer.step()
        results.append(vector(model))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("kind", [lambda ps: BatchInvariantAdam(ps, reference_batch_size=1), BatchInvariantSGD])
def test_stale_statistics(kind):
    """Of a gradient zeroed in place there is no step, and none of one set by hand."""
    model, x, y = problem()
    attach(model)
    optimizer = kind(model.parameters())
    train(model, optimizer, x, y, [8])
    before = vector(model)
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    assert torch.equal(before, vector(model)) and optimizer.examples == 8
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(MissingStatistic, match=r"backpropagate|step\(batch_size"):
        optimizer.step()
    assert torch.equal(before, vector(model)) and optimizer.examples == 8


def test_max_norm_bounds_the_gradient_and_leaves_coupled_decay():
    model, x, y = problem()
    theirs, _, _ = problem()
    attach(model)
    options = {"lr": 0.1, "weight_decay": 0.5}
    optimizer = BatchInvariantSGD(
        model.parameters(), batch_size=8, max_norm=0.01, decoupled_weight_decay=False, **options
    )
    a = train(model, optimizer, x, y, [8])
    plain = torch.optim.SGD(theirs.parameters(), **options)
    before = lambda: nn.utils.clip_grad_norm_(theirs.parameters(), 0.01)  # noqa: E731
    b = train(theirs, plain, x, y, [8], before=before)
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_norms_do_not_overflow_in_half_precision():
    p = nn.Parameter(torch.ones(1000, dtype=torch.float16))
    p.grad = torch.full_like(p, 3000.0)
    BatchInvariantSGD([p], lr=1e-3, batch_size=1, max_norm=1e3).step(batch_size=1)
    step = 1e-3 * 1e3 / 1000**0.5
    assert abs(float(1 - p.detach()[0]) - step) < 1e-3


def test_groups_do_not_share_a_tensor_lr():
    lr = torch.tensor(0.1)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = BatchInvariantSGD([{"params": layer.parameters()} for layer in model], lr=lr)
    assert optimizer.param_groups[0]["lr"] is lr and optimizer.param_groups[1]["lr"] is not lr


@pytest.mark.parametrize("r", [1, 4])
@pytest.mark.parametrize("unscale", [False, True])
def test_a_step_by_hand_under_a_named_scaler(r, unscale):
    results = []
    for scaled in (False, True):
        model, x, y = problem()
        scaler = scaler_of()
        attach(model, **({"grad_scaler": scaler} if scaled else {}))
        optimizer = BatchInvariantAdam(model.parameters(), lr=0.01, batch_size=16, reference_batch_size=r)
        loss = F.cross_entropy(model(x[:8]), y[:8])
        (scaler.scale(loss) if scaled else loss).backward()
        if scaled and unscale:
            scaler.unscale_(optimizer)
        optimizer.step()
        results.append(torch.cat([vector(model), optimizer.state[model[0].weight]["exp_avg_sq"].flatten()]))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("compiled", [False, True])
def test_state_in_two_dtypes(compiled):
    """Compiled kernels take addresses: a column of mixed dtypes is not theirs."""
    results = []
    for mixed in (False, True):
        model, x, y = problem(torch.float32)
        attach(model)
        optimizer = BatchInvariantSGD(model.parameters(), momentum=0.9, batch_size=8, compiled=compiled)
        train(model, optimizer, x, y, [8])
        if mixed:
            state = optimizer.state[model[0].bias]
            state["momentum_buffer"] = state["momentum_buffer"].double()
        results.append(train(model, optimizer, x, y, [8]))
    torch.testing.assert_close(*results)


def test_options_that_an_optimizer_has_not_are_not_read():
    model, x, y = problem()
    optimizer = BatchInvariantLion([{"params": model.parameters(), "max_norm": 1e-3}], batch_size=8)
    plain, _, _ = problem()
    a = train(model, optimizer, x, y, [8, 8], batch_size=8)
    assert torch.equal(
        a, train(plain, BatchInvariantLion(plain.parameters(), batch_size=8), x, y, [8, 8], batch_size=8)
    )


def test_a_head_goes_on_while_the_attached_body_stands_still():
    model, x, y = problem()
    body, head = model[:3], model[3]
    attach(body)
    optimizer = BatchInvariantSGD([*body.parameters(), *head.parameters()], lr=0.1, batch_size=8)
    F.cross_entropy(head(body(x[:8])), y[:8]).backward()
    optimizer.step()
    before = vector(head), vector(body)
    optimizer.zero_grad(set_to_none=False)
    with torch.no_grad():
        features = body(x[:8])
    F.cross_entropy(head(features), y[:8]).backward()
    optimizer.step(batch_size=8)
    assert not torch.equal(before[0], vector(head)) and torch.equal(before[1], vector(body))


def test_a_model_whose_gradients_were_zeroed_stands_still_beside_another():
    models = [problem()[0] for _ in range(2)]
    _, x, y = problem()
    for model in models:
        attach(model)
    optimizer = BatchInvariantAdam([p for model in models for p in model.parameters()], reference_batch_size=1)
    sum(F.cross_entropy(model(x[:8]), y[:8]) for model in models).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    before = [vector(model) for model in models]
    F.cross_entropy(models[0](x[:8]), y[:8]).backward()
    optimizer.step()
    assert [torch.equal(vector(model), p) for model, p in zip(models, before, strict=True)] == [False, True]


def test_states_of_others_are_refused():
    model, x, y = problem()
    F.cross_entropy(model(x), y).backward()
    theirs = torch.optim.Adam(model.parameters())
    theirs.step()
    optimizer = BatchInvariantAdam(model.parameters())
    with pytest.raises(GradstatsError, match=r"does not count examples.*from_torch"):
        optimizer.load_state_dict(theirs.state_dict())
    assert not optimizer.state
    a, b = (nn.Parameter(torch.zeros(shape)) for shape in ((4, 5), (5, 4)))
    saved = BatchInvariantSGD([a, b], momentum=0.9)
    for p in (a, b):
        p.grad = torch.ones_like(p)
    saved.step(batch_size=1)
    with pytest.raises(GradstatsError, match=r"'momentum_buffer' \(4, 5\).*shape \(5, 4\).*order"):
        BatchInvariantSGD([b, a], momentum=0.9).load_state_dict(saved.state_dict())


def test_what_an_option_makes_it_keep_cannot_be_made_up():
    p = nn.Parameter(torch.zeros(2))
    optimizer = BatchInvariantSGD([p], average="debiased_ewma")
    p.grad = torch.ones_like(p)
    optimizer.step(batch_size=4)
    optimizer.param_groups[0]["momentum"] = 0.9
    with pytest.raises(GradstatsError, match=r"no 'exp_avg' after 4 examples"):
        optimizer.step(batch_size=4)


def test_a_gradient_at_a_used_address_is_another():
    for _ in range(50):
        p = nn.Linear(4, 3, bias=False)
        attach(p)
        optimizer = BatchInvariantAdam(p.parameters(), reference_batch_size=1)
        x = torch.randn(8, 4)
        p(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        (p.weight.grad,) = torch.autograd.grad(1000 * p(x).square().mean(), [p.weight])
        with pytest.raises(MissingStatistic, match="another tensor"):
            optimizer.step()


def test_a_group_added_later_has_the_tensor_lr_of_the_start():
    lr = torch.tensor(0.1)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = BatchInvariantSGD(model[0].parameters(), lr=lr)
    lr.fill_(0.5)
    optimizer.add_param_group({"params": list(model[1].parameters())})
    assert [float(group["lr"]) for group in optimizer.param_groups] == [0.5, pytest.approx(0.1)]


def test_max_norm_bounds_the_step_where_the_average_is_its_own_floor():
    """R = inf: m~ is in the numerator and in the denominator."""
    model, x, y = problem()
    before = vector(model)
    attach(model)
    options = {"lr": 0.1, "batch_size": 8, "reference_batch_size": float("inf")}
    after = train(model, BatchInvariantAdam(model.parameters(), max_norm=1e-6, **options), x, y, [8, 8])
    free, _, _ = problem()
    attach(free)
    unbounded = train(free, BatchInvariantAdam(free.parameters(), **options), x, y, [8, 8])
    assert (after - before).norm() < 1e-4 * (unbounded - before).norm()


def test_a_variance_of_infinite_batches_is_refused():
    for kind in (BatchInvariantAdam, BatchInvariantRMSprop):
        with pytest.raises(GradstatsError, match="finite R"):
            kind(nn.Linear(2, 2).parameters(), source="variance", reference_batch_size=float("inf"))


def test_noise_has_a_horizon_in_examples():
    optimizer = SaturatingSGD.in_examples(nn.Linear(2, 2).parameters(), lr=0.1, noise_horizon=1000)
    assert optimizer.param_groups[0]["noise_beta"] == 1 - 1 / 1000


def test_options_as_text_say_so():
    p = nn.Linear(2, 2).parameters
    with pytest.raises(GradstatsError, match=r"BatchInvariantAdam: invalid lr = '1e-3', which is text"):
        BatchInvariantAdam(p(), lr="1e-3")
    with pytest.raises(GradstatsError, match=r"maximize = 'false': True or False"):
        BatchInvariantAdam(p(), maximize="false")
    with pytest.raises(GradstatsError, match=r"invalid source = 'second_moments': one of"):
        BatchInvariantAdam(p(), source="second_moments")
    with pytest.raises(GradstatsError, match=r"step\(batch_size=\.\.\.\)"):
        BatchInvariantSGD(p()).step(16)


@pytest.mark.parametrize(
    ("kind", "horizons", "tuned"),
    [
        (BatchInvariantSignSGD, {"horizon": 100}, {"momentum": 0.99}),
        (BatchInvariantLion, {"horizons": (10, 100)}, {"betas": (0.9, 0.99)}),
        (QuenchingSGD, {"noise_horizon": 100}, {"noise_beta": 0.99}),
    ],
)
def test_in_examples_is_the_tuning_at_batch_size_one(kind, horizons, tuned):
    results = []
    for make in (
        lambda ps: kind.in_examples(ps, lr=1e-3, **horizons),
        lambda ps: kind(ps, 1e-3, batch_size=1, **tuned),
    ):
        model, x, y = problem()
        attach(model)
        results.append(train(model, make(model.parameters()), x, y, [16, 1, 64]))
    assert torch.equal(*results)
    with pytest.raises(GradstatsError, match="horizons are numbers"):
        kind.in_examples(
            nn.Linear(1, 1).parameters(), **{name: ("2560", 1) if name == "horizons" else 0.5 for name in horizons}
        )


def test_options_of_a_class_made_of_others_are_those_of_all():
    for wrong in ({"over": "all"}, {"source": "nothing"}, {"noise_beta": 1.0}, {"denominator": "nothing"}):
        (name,) = wrong
        with pytest.raises(GradstatsError, match=f"SaturatingAdam: invalid {name}"):
            SaturatingAdam(nn.Linear(2, 2).parameters(), **wrong)
