"""Optimizers where statistics are gathered in every k-th window, or from a part of the examples."""

import copy

import pytest
import torch
import torch.nn.functional as F

from gradstats import GradstatsError, attach
from gradstats.optim import AdaptiveBatchSize, BatchInvariantAdam, BatchInvariantRMSprop
from tests.gradstats.optim import reference
from tests.gradstats.optim.problem import problem, train, vector
from tests.gradstats.optim.quartic import Quartic
from tests.optimizers import ROWS

D = torch.float64
SIZES = [16, 7, 64, 16, 8, 5, 32] * 4
ARGS = {"lr": 0.02, "betas": (0.9, 0.97), "eps": 1e-8, "weight_decay": 0.1, "batch_size": 8}


def per_example(p, x):
    """Gradients of the mean over b of |p - x_b|^4/4: (B, *shape)."""
    return (p.detach() - x) ** 3


def follow(model, stats, optimizer, twin, sizes):
    """The same steps by the twin, which knows squares when they were gathered."""
    for b in sizes:
        x = torch.randn(b, 3, dtype=D)
        gradients = per_example(model.p, x)
        optimizer.zero_grad()
        model(x).mean().backward()
        expected = twin.step(gradients, stats.gathered)
        optimizer.step()
        assert (model.p - expected).abs().max() <= 1e-10


@pytest.mark.parametrize("every", [2, 5])
@pytest.mark.parametrize("r", [1, 4, 16, 64])
@pytest.mark.parametrize("average", ["debiased_ewma", "ewma", "mean", "slides"])
def test_follows_its_equations(every, r, average):
    model = Quartic()
    stats = attach(model, every=every)
    optimizer = BatchInvariantAdam(model.parameters(), reference_batch_size=r, average=average, **ARGS)
    twin = reference.Adam(model.p.detach(), sampled=True, reference=r, average=average, **ARGS)
    follow(model, stats, optimizer, twin, SIZES)
    assert optimizer.state[model.p]["step"] == sum(SIZES)


@pytest.mark.parametrize(
    "options",
    [
        {"amsgrad": True},
        {"amsgrad": True, "reference": 64, "average": "ewma"},
        {"source": "variance"},
        {"source": "mean_square"},
        {"source": "squared_batch_mean"},
        {"reference": 64, "estimator": "previous"},
        {"reference": 64, "estimator": "in_batch"},
        {"denominator": "slides"},
    ],
    ids=str,
)
def test_follows_its_equations_at_other_choices(options):
    options = {"reference": 4} | options
    model = Quartic()
    stats = attach(model, every=3)
    theirs = {name: value for name, value in options.items() if name != "reference"}
    optimizer = BatchInvariantAdam(model.parameters(), reference_batch_size=options["reference"], **ARGS, **theirs)
    follow(model, stats, optimizer, reference.Adam(model.p.detach(), sampled=True, **ARGS, **options), SIZES)


def test_rmsprop_follows_its_equations():
    """Adam's without a momentum."""
    model = Quartic()
    stats = attach(model, every=3)
    optimizer = BatchInvariantRMSprop(
        model.parameters(), lr=0.02, alpha=0.97, eps=1e-8, weight_decay=0.1, batch_size=8, reference_batch_size=4
    )
    args = ARGS | {"betas": (0.0, 0.97)}
    follow(
        model,
        stats,
        optimizer,
        reference.Adam(model.p.detach(), sampled=True, reference=4, average="ewma", **args),
        SIZES,
    )


def test_an_examples_weight_is_that_of_its_horizon():
    """Examples that come with the window gathered before them weigh as they do where all are gathered."""
    model, x, y = problem()
    stats, rho, found = attach(model, every=3), 0.97 ** (1 / 8), []
    optimizer = BatchInvariantAdam(model.parameters(), lr=0.0, betas=(0.9, 0.97), batch_size=8, reference_batch_size=1)
    train(
        model, optimizer, x, y, SIZES, lambda: found.append(stats.second_moment["0.weight"] if stats.gathered else None)
    )
    ends = torch.tensor(SIZES, dtype=D).cumsum(0).tolist()
    total, start, end = 0.0, 0.0, ends[max(i for i, q in enumerate(found) if q is not None)]
    for q, seen in zip(found, ends, strict=True):
        if q is not None:  # it stands for the examples from start to seen
            total = total + (rho ** (end - seen) - rho ** (end - start)) / (1 - rho**end) * q
            start = seen
    torch.testing.assert_close(optimizer.state[model[0].weight]["exp_avg_sq"], total)


def test_accumulation_is_one_larger_batch():
    results = []
    for parts in (1, 4):
        model, x, y = problem()
        attach(model, every=2)
        optimizer = BatchInvariantAdam(model.parameters(), lr=0.01, batch_size=8, reference_batch_size=1)
        for i in range(6):
            optimizer.zero_grad()
            for rows in torch.arange(16 * i, 16 * (i + 1)).chunk(parts):
                (F.cross_entropy(model(x[rows]), y[rows]) / parts).backward()
            optimizer.step()
        results.append(vector(model))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("r", [1, 64])
def test_a_checkpoint_continues_within_a_cycle(r):
    """The restored model's first window is gathered, wherever the other stands: its average knows its own age."""
    model = Quartic()
    stats = attach(model, every=4)
    optimizer = BatchInvariantAdam(model.parameters(), reference_batch_size=r, **ARGS)
    twin = reference.Adam(model.p.detach(), sampled=True, reference=r, **ARGS)
    follow(model, stats, optimizer, twin, [16, 7, 9])
    assert not stats.gathered
    other = Quartic()
    other.load_state_dict(model.state_dict())
    handle = attach(other, every=4)
    restored = BatchInvariantAdam(other.parameters(), reference_batch_size=r, **ARGS)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    follow(other, handle, restored, twin, [5, 8, 16, 4, 4])
    assert handle.gathered


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_optimizer_steps_or_says_that_it_cannot(row):
    """What moves without statistics of the batch stays finite; the others refuse before they have moved."""
    model, x, y = problem()
    before = [p.clone() for p in model.parameters()]
    row.attach(model, every=3)
    optimizer = row(model.parameters())
    reads = bool(row.statistics)
    average = (BatchInvariantAdam, BatchInvariantRMSprop)
    if reads and type(optimizer) not in average:
        with pytest.raises(GradstatsError, match=rf"{row.kind.__name__} reads the statistics of every batch.*every=1"):
            train(model, optimizer, x, y, [16])
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        return
    assert bool(torch.isfinite(train(model, optimizer, x, y, SIZES)).all())
    assert optimizer.examples == row.count(SIZES)


@pytest.mark.parametrize("row", [row for row in ROWS if not row.statistics], ids=lambda row: row.name)
def test_what_reads_nothing_is_the_same(row):
    results = []
    for every in (1, 3):
        model, x, y = problem()
        attach(model, every=every)
        results.append(train(model, row(model.parameters()), x, y, SIZES))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-14)


def test_at_the_reference_batch_size_no_statistics_are_missed():
    """v_B = m^2: the trajectory is torch's, whatever is gathered."""
    results = []
    for every in (1, 3):
        model, x, y = problem()
        attach(model, every=every)
        optimizer = BatchInvariantAdam(model.parameters(), lr=0.01, batch_size=16)
        results.append(train(model, optimizer, x, y, [16] * 20))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-14)


def test_a_parameter_waits_for_its_first_statistics():
    """One that is trained from the middle of a cycle on, with eps = 0 to divide by."""
    model, x, y = problem()
    attach(model, every=3)
    model[0].weight.requires_grad_(False)
    optimizer = BatchInvariantAdam(model.parameters(), lr=0.01, eps=0.0, batch_size=16, reference_batch_size=1)
    train(model, optimizer, x, y, [16])
    model[0].weight.requires_grad_(True)
    before, moved = model[0].weight.clone(), []
    train(model, optimizer, x, y, [16] * 4, lambda: moved.append(not torch.equal(before, model[0].weight)))
    assert moved == [False, False, True, True]
    assert optimizer.state[model[0].weight]["step"] == 32
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_the_batch_size_follows_all_examples():
    model, x, y = problem()
    stats = attach(model, "noise_scale", every=4)
    optimizer, size = torch.optim.SGD(model.parameters(), lr=0.01), AdaptiveBatchSize(2, 16, horizon=1000)
    train(model, optimizer, x, y, [8] * 7, before=lambda: size.update(stats))
    assert size.noise.examples == 5 * 8  # up to the last window that was gathered


@pytest.mark.parametrize("kind", [BatchInvariantAdam, BatchInvariantRMSprop])
@pytest.mark.parametrize("attachment", [{"every": 3}, {"fraction": 0.25}])
def test_no_element_moves_by_more_than_lr(kind, attachment):
    """One whose gradient was not 0 only where nothing was gathered."""
    model, lr, b = torch.nn.Linear(2, 1, bias=False).double(), 0.01, 16
    stats = attach(model, **attachment)
    optimizer = kind(model.parameters(), lr=lr, batch_size=b, reference_batch_size=1)
    for i in range(12):
        x = torch.randn(b, 2, dtype=D)
        x[1:, 1] = 0  # a rare feature, of one example
        x[:, 1] *= i % 3 != 0
        before = model.weight.clone()
        optimizer.zero_grad()
        model(x).sum(1).mean().backward()
        optimizer.step()
        assert (model.weight - before).abs().max() <= lr * (1 + 1e-9)
    assert stats.batch_size == b


@pytest.mark.parametrize(
    "options", [{}, {"reference_batch_size": 1}, {"reference_batch_size": 64}, {"source": "variance"}]
)
def test_a_part_of_the_examples(options):
    model, x, y = problem()
    attach(model, fraction=0.25, every=2)
    optimizer = BatchInvariantAdam(model.parameters(), lr=0.01, batch_size=16, **options)
    train(model, optimizer, x, y, SIZES)
    for state in optimizer.state.values():
        assert bool((optimizer_floor(optimizer, state) >= 0).all())
    assert bool(torch.isfinite(torch.cat([p.flatten() for p in model.parameters()])).all())


def optimizer_floor(optimizer, state):
    """s as the step divides by it."""
    s = state["exp_avg_sq"]
    return s.clamp(min=0) if "exp_avg_q" in state or optimizer.defaults["source"] == "variance" else s


def test_compiled_and_plain_agree():
    results = []
    for compiled in (False, True):
        model, x, y = problem()
        attach(model, every=3)
        optimizer = BatchInvariantAdam(
            model.parameters(), lr=0.01, batch_size=16, reference_batch_size=1, compiled=compiled
        )
        results.append(train(model, optimizer, x, y, [16] * 7))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)
