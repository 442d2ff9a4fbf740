"""BatchInvariantAdam: its equations, and what they promise. What all optimizers share is in test_contract.py."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gradstats import GradstatsError, LifetimeError, MissingStatistic, attach, attached
from gradstats.optim import BatchInvariantAdam
from tests import oracle
from tests.gradstats.optim import reference
from tests.gradstats.optim.problem import problem, train, vector
from tests.gradstats.optim.quartic import Quartic

D = torch.float64


def batch(x, y, i, b):
    rows = torch.arange(i * b, (i + 1) * b) % len(x)
    return x[rows], y[rows]


def per_example(p, x):
    """Gradients of the mean over b of |p - x_b|^4/4: (B, *shape)."""
    return (p.detach() - x) ** 3


@pytest.mark.parametrize("sizes", [[64] * 20, [4] * 60, [1] * 60, [1, 7, 64, 3, 2, 1, 16, 256, 5] * 5])
@pytest.mark.parametrize("r", [1, 4, 64])
@pytest.mark.parametrize("average", ["debiased_ewma", "slides"])
def test_follows_its_equations(sizes, r, average):
    model = Quartic()
    handle = attach(model)
    args = {"lr": 0.02, "betas": (0.9, 0.97), "eps": 1e-8, "weight_decay": 0.1, "batch_size": 8}
    optimizer = BatchInvariantAdam(model.parameters(), reference_batch_size=r, average=average, **args)
    twin = reference.Adam(model.p.detach(), reference=r, average=average, **args)
    for b in sizes:
        x = torch.randn(b, 3, dtype=D)
        expected = twin.step(per_example(model.p, x))
        optimizer.zero_grad()
        model(x).mean().backward()
        assert handle.batch_size == b
        optimizer.step()
        assert (model.p - expected).abs().max() <= 1e-10
    state = optimizer.state[model.p]
    assert state["step"] == sum(sizes) and not state["step"].is_floating_point()
    assert ("exp_avg_q" in state) == (r > min(sizes))


def test_first_s_is_the_oracles_mean_of_squares():
    model, x, y = problem()
    c = oracle.contributions(model, F.cross_entropy, x[:64], y[:64])
    attach(model)
    optimizer = BatchInvariantAdam(model.parameters(), batch_size=64, reference_batch_size=1)
    train(model, optimizer, x, y, [64])
    for name, p in model.named_parameters():
        torch.testing.assert_close(
            optimizer.state[p]["exp_avg_sq"], oracle.second_moment(c[name]), rtol=1e-10, atol=1e-14
        )


def averages(model, x, y, sizes, lr=0.0):
    """The averages after one pass, at fixed parameters."""
    attach(model)
    optimizer = BatchInvariantAdam(model.parameters(), lr=lr, batch_size=64, reference_batch_size=1)
    train(model, optimizer, x, y, sizes)
    return [(optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"]) for p in model.parameters()]


def test_splitting_a_batch_of_equal_examples_gives_the_same_averages():
    results = []
    for sizes in ([64, 64], [32, 32, 60, 4], [1] * 128):
        model, x, y = problem()
        x, y = x[:2].repeat_interleave(64, 0), y[:2].repeat_interleave(64)
        results.append(averages(model, x, y, sizes))
    for other in results[1:]:
        for (m, s), (m2, s2) in zip(results[0], other, strict=True):
            torch.testing.assert_close(m, m2, rtol=1e-9, atol=1e-14)
            torch.testing.assert_close(s, s2, rtol=1e-9, atol=1e-16)


def test_duplicating_all_examples_leaves_v1():
    model, x, y = problem()
    twice = copy.deepcopy(model)
    a = averages(model, x, y, [32])
    b = averages(twice, x[:32].repeat(2, 1), y[:32].repeat(2), [64])
    for (m, s), (m2, s2) in zip(a, b, strict=True):
        torch.testing.assert_close(m, m2)
        torch.testing.assert_close(s, s2)


def test_accumulation_is_one_larger_batch():
    model, x, y = problem()
    other = copy.deepcopy(model)
    attach(model)
    attach(other)
    a, b = (BatchInvariantAdam(m.parameters(), lr=0.1, batch_size=8, reference_batch_size=4) for m in (model, other))
    for i in range(5):
        x_i, y_i = batch(x, y, i, 32)
        a.zero_grad()
        F.cross_entropy(model(x_i), y_i).backward()
        a.step()
        b.zero_grad()
        for rows in (slice(0, 8), slice(8, 32)):
            (F.cross_entropy(other(x_i[rows]), y_i[rows]) * len(y_i[rows]) / 32).backward()
        b.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_sum_loss_is_mean_loss():
    results = []
    for reduction in ("mean", "sum"):
        model, x, y = problem()
        attach(model, loss_reduction=reduction)
        optimizer = BatchInvariantAdam(model.parameters(), lr=0.1, batch_size=8)
        for i in range(4):
            optimizer.zero_grad()
            x_i, y_i = batch(x, y, i, 16)
            F.cross_entropy(model(x_i), y_i, reduction=reduction).backward()
            optimizer.step()
        results.append([p.detach() for p in model.parameters()])
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_in_examples_is_the_tuning_at_batch_size_one():
    results = []
    for make in (
        lambda ps: BatchInvariantAdam.in_examples(ps, lr=1e-3, horizons=(100, 1000), reference_batch_size=4),
        lambda ps: BatchInvariantAdam(ps, lr=1e-3, betas=(0.99, 0.999), batch_size=1, reference_batch_size=4),
    ):
        model, x, y = problem()
        attach(model)
        results.append(train(model, make(model.parameters()), x, y, [16, 1, 64]))
    assert torch.equal(*results)


def test_weight_decay_per_example_does_not_depend_on_the_batch_size():
    results = []
    for sizes in ([64], [16] * 4, [1] * 64):
        model = Quartic()
        attach(model)
        optimizer = BatchInvariantAdam(model.parameters(), lr=0.1, eps=1e30, weight_decay=0.5, batch_size=16)
        for b in sizes:
            optimizer.zero_grad()
            model(torch.randn(b, 3, dtype=D)).mean().backward()
            optimizer.step()
        results.append(model.p.detach())
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(results[0], results[2])
    torch.testing.assert_close(results[0], Quartic().p.detach() * (1 - 0.1 * 0.5) ** 4)


def test_max_norm_bounds_the_running_average_over_all_groups():
    model, x, y = problem()
    attach(model)
    groups = [{"params": model[0].parameters()}, {"params": [*model[2].parameters(), *model[3].parameters()]}]
    # eps far above sqrt(s) makes the step lr m~ / eps: its norm is lr max_norm / eps when the bound is active.
    optimizer = BatchInvariantAdam(groups, lr=1.0, eps=1e3, batch_size=16, max_norm=1e-3)
    before = vector(model)
    after = train(model, optimizer, x, y, [16])
    norm = torch.cat([s["exp_avg"].flatten() for s in optimizer.state.values()]).norm()
    assert norm > 1e-3
    torch.testing.assert_close((after - before).norm(), torch.tensor(1e-3 / 1e3, dtype=D), rtol=1e-3, atol=0)


def test_missing_and_changed_statistics_are_refused():
    model, x, y = problem()
    optimizer = BatchInvariantAdam(model.parameters(), batch_size=16)
    with pytest.raises(MissingStatistic, match=r"gradstats.attach\(model\)"):
        train(model, optimizer, x, y, [16])
    model.zero_grad()
    attach(model, "norms")
    with pytest.raises(MissingStatistic, match="attach"):
        train(model, optimizer, x, y, [16])
    attached(model).detach()
    model.zero_grad()
    attach(model)
    F.cross_entropy(model(x[:8]), y[:8]).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    with pytest.raises(LifetimeError, match="max_norm"):
        optimizer.step()


def test_decay_above_one_is_refused():
    """A negative factor has no power B/batch_size."""
    model, x, y = problem()
    attach(model)
    optimizer = BatchInvariantAdam(model.parameters(), lr=2.0, weight_decay=0.6, batch_size=16)
    with pytest.raises(GradstatsError, match="weight_decay = 0.6"):
        train(model, optimizer, x, y, [4])


def test_horizons_below_one_example_are_refused():
    with pytest.raises(GradstatsError, match="horizons"):
        BatchInvariantAdam.in_examples(nn.Linear(2, 2).parameters(), horizons=(0.5, 10))


def test_error_about_the_average_names_the_choices():
    with pytest.raises(GradstatsError, match="debiased_ewma"):
        BatchInvariantAdam(nn.Linear(2, 2).parameters(), average="linear")
