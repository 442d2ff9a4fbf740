"""How an optimizer finds the batch size and the statistics of its parameters."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gradstats import GradstatsError, MissingStatistic, attach
from gradstats.optim import (
    BatchInvariantAdam,
    BatchInvariantSGD,
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
