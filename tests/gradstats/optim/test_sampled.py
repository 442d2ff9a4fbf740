"""Optimizers where statistics are gathered in every k-th window, or from a part of the examples."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from gradstats import GradstatsError, attach
from gradstats.optim import AdaptiveBatchSize, BatchInvariantAdam, BatchInvariantRMSprop
from gradstats.optim.parts import COVERED
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
    twin = reference.Adam(model.p.detach(), reference=r, average=average, **ARGS)
    follow(model, stats, optimizer, twin, SIZES)
    assert optimizer.state[model.p]["step"] == sum(SIZES)


@pytest.mark.parametrize(
    "options",
    [
        {"amsgrad": True},
        {"amsgrad": True, "reference": 64, "average": "ewma"},
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
    follow(model, stats, optimizer, reference.Adam(model.p.detach(), **ARGS, **options), SIZES)


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
        reference.Adam(model.p.detach(), reference=4, average="ewma", **args),
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
    twin = reference.Adam(model.p.detach(), reference=r, **ARGS)
    follow(model, stats, optimizer, twin, [16, 7, 9])
    assert not stats.gathered
    other = Quartic()
    other.load_state_dict(model.state_dict())
    handle = attach(other, every=4)
    restored = BatchInvariantAdam(other.parameters(), reference_batch_size=r, **ARGS)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    follow(other, handle, restored, twin, [5, 8, 16, 4, 4])
    assert handle.gathered


@pytest.mark.parametrize("part", [{"every": 3}, {"fraction": 0.5}], ids=str)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_optimizer_steps_or_says_that_it_cannot(row, part):
    """What moves without statistics of the batch stays finite; the others refuse before they have moved."""
    model, x, y = problem()
    before = [p.clone() for p in model.parameters()]
    replace(row, unit=1).attach(model, **part)
    optimizer = row(model.parameters())
    reads = bool(row.statistics)
    averages = (
        type(optimizer) in (BatchInvariantAdam, BatchInvariantRMSprop) and row.options.get("source") != "variance"
    )
    if reads and not averages:
        with pytest.raises(GradstatsError, match=rf"{row.kind.__name__} with these options needs.*{next(iter(part))}="):
            train(model, optimizer, x, y, [16])
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        return
    assert bool(torch.isfinite(train(model, optimizer, x, y, SIZES)).all())
    assert optimizer.examples == sum(SIZES)


@pytest.mark.parametrize("row", [row for row in ROWS if not row.statistics], ids=lambda row: row.name)
def test_what_reads_nothing_is_the_same(row):
    results = []
    for every in (1, 3):
        model, x, y = problem()
        attach(model, every=every)
        results.append(train(model, row(model.parameters()), x, y, SIZES))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("part", [{"every": 3}, {"fraction": 0.5}], ids=str)
def test_at_the_reference_batch_size_no_statistics_are_missed(part):
    """v_B = m^2: the trajectory is torch's, whatever is gathered."""
    results = []
    for attachment in ({}, part):
        model, x, y = problem()
        attach(model, **attachment)
        optimizer = BatchInvariantAdam(model.parameters(), lr=0.01, batch_size=16)
        results.append(train(model, optimizer, x, y, [16] * 20))
        assert not any(COVERED in state for state in optimizer.state.values())
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
    optimizer = kind(model.parameters(), lr=lr, batch_size=b, reference_batch_size=1, average="debiased_ewma")
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


LR = 0.01
# Rows of an embedding: 5 to 9 are of examples of the second window only, and 6 of the fifth.
ROWS_SEEN = [[1, 2, 3, 4], [5, 7, 6], [1, 2, 3, 4], [1, 2, 3, 4], [6, 1, 2], [1, 2, 3, 4], [3, 4, 1, 2]]


def embedding(kind, part, **options):
    torch.manual_seed(0)
    model = torch.nn.Embedding(10, 3, dtype=D)
    stats = attach(model, **part)
    options = {"lr": LR, "batch_size": 4, "average": "debiased_ewma"} | options
    return model, stats, kind(model.parameters(), **options)


def largest_step(model, optimizer, rows):
    before = model.weight.detach().clone()
    optimizer.zero_grad()
    model(torch.tensor(rows)).square().mean().backward()
    optimizer.step()
    return (model.weight - before).abs().max()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (BatchInvariantAdam, {}),
        (BatchInvariantAdam, {"amsgrad": True}),
        (BatchInvariantAdam, {"reference_batch_size": 8}),
        (BatchInvariantAdam, {"reference_batch_size": 2}),
        (BatchInvariantRMSprop, {}),
        (BatchInvariantRMSprop, {"momentum": 0.5}),
    ],
)
@pytest.mark.parametrize("part", [{"every": 2}, {"every": 3}, {"every": 7}, {"fraction": 0.5}], ids=str)
@pytest.mark.parametrize("ends", [False, True])
def test_steps_stay_bounded(kind, options, part, ends):
    """At B = R, where nothing is read, and once the sampling has ended."""
    model, stats, optimizer = embedding(kind, part, **options)
    for i, rows in enumerate(ROWS_SEEN):
        if ends and i == 2:
            stats.detach()
            optimizer.zero_grad()
            attach(model)
        assert largest_step(model, optimizer, rows) <= LR * (1 + 1e-9) / (1 - options.get("momentum", 0))


def test_what_is_centered_stays_bounded():
    """A gradient far below its average, of which s has seen nothing."""
    model = torch.nn.Linear(2, 1, bias=False).double()
    attach(model, every=4)
    optimizer = BatchInvariantRMSprop(
        model.parameters(), lr=LR, batch_size=4, centered=True, reference_batch_size=1, average="debiased_ewma"
    )
    for scale in (0.0, 1.0, 1e-3):
        before = model.weight.detach().clone()
        optimizer.zero_grad()
        x = torch.stack([torch.randn(4, dtype=D), torch.full((4,), scale, dtype=D)], 1)
        model(x).mean().backward()
        optimizer.step()
        assert (model.weight - before)[:, 1].abs().max() <= LR * (1 + 1e-9)


@pytest.mark.parametrize("attachment", [{}, {"every": 2}], ids=str)
def test_a_checkpoint_continues_to_the_bit(attachment):
    """What was missed before is known after, whether the sampling goes on or has ended."""
    results = []
    for saved in (False, True):
        model, stats, optimizer = embedding(BatchInvariantAdam, {"every": 2})
        for rows in ROWS_SEEN[:2]:
            largest_step(model, optimizer, rows)
        stats.detach()
        optimizer.zero_grad()
        if saved:
            state = copy.deepcopy(optimizer.state_dict())
            weight = model.weight.detach().clone()
            model, _, optimizer = embedding(BatchInvariantAdam, attachment)
            model.load_state_dict({"weight": weight})
            optimizer.load_state_dict(state)
        else:
            attach(model, **attachment)
        for rows in ROWS_SEEN[2:]:
            assert largest_step(model, optimizer, rows) <= LR * (1 + 1e-9)
        results.append((model.weight.detach(), optimizer.state[model.weight]))
    (weight, state), (restored, theirs) = results
    assert torch.equal(weight, restored) and state.keys() == theirs.keys()
    assert all(torch.equal(state[name], theirs[name]) for name in state)


@pytest.mark.parametrize("r", [1, 8, 64])
def test_goes_on_by_its_equations_once_the_sampling_has_ended(r):
    model = Quartic()
    stats = attach(model, every=4)
    optimizer = BatchInvariantAdam(model.parameters(), reference_batch_size=r, **ARGS)
    twin = reference.Adam(model.p.detach(), reference=r, **ARGS)
    follow(model, stats, optimizer, twin, [16, 7, 9])
    stats.detach()
    optimizer.zero_grad()
    follow(model, attach(model), optimizer, twin, [5, 8, 16, 4, 8])
    state = optimizer.state[model.p]
    assert twin.missed and state[COVERED] == state["step"]


@pytest.mark.parametrize("r", [1, 4])
@pytest.mark.parametrize("part", [{"every": 2}, {"every": 4}, {"fraction": 0.5}], ids=str)
@pytest.mark.parametrize("amsgrad", [False, True])
def test_torchs_goes_on_bounded(r, part, amsgrad):
    for steps in (2, 3, 4):  # between two gathered windows, and after the second
        model, stats, optimizer = embedding(BatchInvariantAdam, part, reference_batch_size=r, amsgrad=amsgrad)
        for rows in ROWS_SEEN[:steps]:
            largest_step(model, optimizer, rows)
        theirs = optimizer.to_torch(4)
        stats.detach()
        lr = theirs.param_groups[0]["lr"] / (r / 4) ** 0.5
        for rows in ROWS_SEEN[2:]:
            assert largest_step(model, theirs, rows) <= lr * (1 + 1e-6)


def test_torchs_rmsprop_goes_on_bounded():
    """Which keeps no average of gradients, and squares the new one before it divides."""
    model, stats, optimizer = embedding(BatchInvariantRMSprop, {"every": 2}, reference_batch_size=1, alpha=0.99)
    for rows in ROWS_SEEN[:2]:
        largest_step(model, optimizer, rows)
    theirs = optimizer.to_torch(4)
    stats.detach()
    lr = theirs.param_groups[0]["lr"]
    for rows in ROWS_SEEN[1:]:
        assert largest_step(model, theirs, rows) <= lr / (1 - 0.99) ** 0.5


def test_another_source_goes_on_bounded():
    model, _, optimizer = embedding(BatchInvariantAdam, {"every": 4})
    for i, rows in enumerate(ROWS_SEEN):
        if i == 2:
            optimizer.param_groups[0]["source"] = "squared_batch_mean"
        assert largest_step(model, optimizer, rows) <= LR * (1 + 1e-9)
    state = optimizer.state[model.weight]
    assert state[COVERED] == state["step"]


def test_no_kernel_without_the_bound_takes_it():
    pytest.importorskip("triton")
    from gradstats.kernels import adam

    optimizer = BatchInvariantAdam([torch.zeros(3, requires_grad=True)], batch_size=8)
    names = ("parameter", "gradient", "exp_avg", "exp_avg_sq", "sum_of_squares")
    for b in (8, 16):
        columns = {name: [torch.zeros(3)] for name in names}
        plain, bounded = (optimizer.update(optimizer.param_groups[0], b, state) for state in ({}, {COVERED: b}))
        assert adam.serves(plain, "both", columns) and not adam.serves(bounded, "both", columns)


@pytest.mark.parametrize("options", [{}, {"reference_batch_size": 1}, {"reference_batch_size": 64}], ids=str)
def test_a_part_of_the_examples(options):
    model, x, y = problem()
    attach(model, fraction=0.25, every=2)
    optimizer = BatchInvariantAdam(model.parameters(), lr=0.01, batch_size=16, **options)
    assert bool(torch.isfinite(train(model, optimizer, x, y, SIZES)).all())


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
