"""Schedules in examples: their equations, that batches cut them without loss, and the contract of an LRScheduler."""

import copy
import io
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.optim.lr_scheduler import ExponentialLR, LambdaLR, LRScheduler, SequentialLR

from gradstats import GradstatsError, attach
from gradstats.optim import (
    BatchInvariantAdam,
    Constant,
    Cosine,
    ExampleLR,
    InverseSquareRoot,
    Linear,
    Warmup,
    from_torch,
    to_torch,
)
from tests.gradstats.optim.problem import problem, train

LONG = Warmup(1_000).then(Constant(2_000)).then(Linear(3_000, end=0.1))

# A schedule, and its multiplier at e examples.
EQUATIONS = {
    "constant": (Constant(), lambda e: 1.0),
    "linear": (Linear(3_000), lambda e: max(1 - e / 3_000, 0)),
    "linear to a fraction": (Linear(3_000, 0.8, 0.2), lambda e: 0.8 - 0.6 * min(e / 3_000, 1)),
    "warm-up": (Warmup(700), lambda e: min(e / 700, 1)),
    "no warm-up": (Warmup(0), lambda e: 1.0),
    "cosine": (Cosine(3_000), lambda e: (1 + math.cos(math.pi * min(e / 3_000, 1))) / 2),
    "cosine to a fraction": (
        Cosine(3_000, end=0.1),
        lambda e: 0.1 + 0.9 * (1 + math.cos(math.pi * min(e / 3_000, 1))) / 2,
    ),
    "inverse square root": (InverseSquareRoot(500), lambda e: math.sqrt(500 / (500 + e))),
    "vaswani": (
        Warmup(500).then(InverseSquareRoot(500)),
        lambda e: 500**0.5 * min(max(e, 1e-9) ** -0.5, e * 500**-1.5),
    ),
    "warm-up, plateau, decay": (
        LONG,
        lambda e: min(e / 1_000, 1.0) if e < 3_000 else 1 - 0.9 * min((e - 3_000) / 3_000, 1),
    ),
}


@pytest.mark.parametrize("name", EQUATIONS)
def test_mean_is_that_of_the_multiplier(name):
    schedule, f = EQUATIONS[name]
    stretches = [(0, 1), (0, 256), (64, 128), (690, 710), (499, 1_001), (2_990, 3_010), (0, 7_000), (6_500, 6_501)]
    for start, stop in stretches:
        n = 40 * (stop - start)
        midpoints = [start + (i + 0.5) / 40 for i in range(n)]
        assert schedule.mean(start, stop) == pytest.approx(sum(map(f, midpoints)) / n, rel=1e-5, abs=1e-8)


SIZES = st.lists(st.integers(1, 700), min_size=1, max_size=60)


@pytest.mark.parametrize("name", EQUATIONS)
@given(start=st.integers(0, 5_000), sizes=SIZES)
@settings(max_examples=60, deadline=None)
def test_the_sum_over_a_stretch_does_not_depend_on_how_it_is_cut(name, start, sizes):
    schedule, _ = EQUATIONS[name]
    total, e = 0.0, start
    for b in sizes:
        total += b * schedule.mean(e, e + b)
        e += b
    assert total == pytest.approx(schedule.integral(start, e), rel=1e-12, abs=1e-9)


def test_means_keep_their_digits_at_large_counts():
    e = 10**12
    assert InverseSquareRoot(1000).mean(e, e + 1) == pytest.approx((1000 / (e + 1000)) ** 0.5, rel=1e-11)
    assert Cosine(4 * e).mean(e, e + 1) == pytest.approx((1 + math.cos(math.pi / 4)) / 2, rel=1e-11)


def test_what_cannot_be_is_refused():
    for wrong in (
        lambda: Warmup(-1),
        lambda: Linear(math.inf),
        lambda: Cosine(100, end=-0.1),
        lambda: Cosine(100, start=math.nan),
        lambda: Constant(-1),
        lambda: InverseSquareRoot(0),
    ):
        with pytest.raises(GradstatsError):
            wrong()
    with pytest.raises(GradstatsError, match="does not end"):
        Warmup(10).then(InverseSquareRoot(10)).then(Cosine(10))


# ExampleLR

SCHEDULE = Warmup(100).then(Cosine(400))
BATCHES = [16, 3, 64, 1, 40, 120, 7, 300, 16]


def start(**options):
    model, x, y = problem()
    attach(model)
    optimizer = BatchInvariantAdam(model.parameters(), **{"lr": 0.1, "batch_size": 16} | options)
    return model, x, y, optimizer


def test_every_step_takes_the_mean_over_its_examples():
    model, x, y, optimizer = start()
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2))], "lr": 0.3})
    scheduler = ExampleLR(optimizer, SCHEDULE)
    seen = []

    def note():
        seen.append([group["lr"] for group in optimizer.param_groups])
        assert scheduler.get_last_lr() == seen[-1]

    train(model, optimizer, x, y, BATCHES, after=note)
    e = 0
    for b, lrs in zip(BATCHES, seen, strict=True):
        assert lrs == pytest.approx([lr * SCHEDULE.mean(e, e + b) for lr in (0.1, 0.3)], rel=1e-14)
        e += b
    assert optimizer.examples == e


def test_a_step_is_that_of_an_optimizer_with_this_learning_rate():
    model, x, y, optimizer = start(weight_decay=0.1)
    ExampleLR(optimizer, SCHEDULE)
    theirs, _, _, plain = start(weight_decay=0.1)

    def by_hand():
        e = plain.examples
        plain.param_groups[0]["lr"] = 0.1 * SCHEDULE.mean(e, e + next(sizes))

    sizes = iter(BATCHES)
    a = train(model, optimizer, x, y, BATCHES)
    assert torch.equal(a, train(theirs, plain, x, y, BATCHES, before=by_hand))


def test_is_a_scheduler_of_torch():
    model, x, y, optimizer = start()
    scheduler = ExampleLR(optimizer, SCHEDULE)
    assert isinstance(scheduler, LRScheduler)
    assert scheduler.base_lrs == [0.1]
    assert scheduler.get_last_lr() == pytest.approx([0.1 * 0.5 / 100])
    reference = [p.detach().clone() for p in model.parameters()]
    other, _, _, unstepped = start()
    ExampleLR(unstepped, SCHEDULE)

    def as_trainers_do():  # Accelerate steps once for every process
        scheduler.step()
        scheduler.step()

    a = train(model, optimizer, x, y, BATCHES, after=as_trainers_do)
    assert torch.equal(a, train(other, unstepped, x, y, BATCHES))
    assert not torch.equal(a, torch.cat([p.flatten() for p in reference]))
    assert scheduler.last_epoch == 2 * len(BATCHES)
    with pytest.raises(GradstatsError, match="without an epoch"):
        scheduler.step(3)


def test_tensor_learning_rates_stay_tensors():
    model, x, y, optimizer = start(lr=torch.tensor(0.1, dtype=torch.float64))
    lr = optimizer.param_groups[0]["lr"]
    scheduler = ExampleLR(optimizer, SCHEDULE)
    other, _, _, plain = start()
    ExampleLR(plain, SCHEDULE)
    a, b = (train(m, o, x, y, BATCHES[:6]) for m, o in ((model, optimizer), (other, plain)))
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    assert optimizer.param_groups[0]["lr"] is lr
    scheduler.get_last_lr()[0].zero_()
    assert lr > 0


@pytest.mark.parametrize("lr", [0.3, torch.tensor(0.3, dtype=torch.float64)])
def test_a_group_added_under_way_follows(lr):
    model, x, y, optimizer = start()
    scheduler = ExampleLR(optimizer, SCHEDULE)
    train(model, optimizer, x, y, BATCHES[:2])
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2))], "lr": lr})
    train(model, optimizer, x, y, [5, 5])
    e = sum(BATCHES[:2]) + 5
    assert list(map(float, scheduler.get_last_lr())) == pytest.approx([a * SCHEDULE.mean(e, e + 5) for a in (0.1, 0.3)])


def through_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("loads", ["before", "after", "scheduler first", "optimizer only"])
def test_a_checkpoint_continues_exactly(loads):
    model, x, y, optimizer = start()
    scheduler = ExampleLR(optimizer, SCHEDULE)
    train(model, optimizer, x, y, BATCHES[:4], after=scheduler.step)
    saved = through_file([model.state_dict(), optimizer.state_dict(), scheduler.state_dict()])

    other, _, _, restored = start()
    other.load_state_dict(saved[0])
    if loads == "before":
        restored.load_state_dict(saved[1])
    again = ExampleLR(restored, SCHEDULE)
    if loads in ("scheduler first", "before"):
        again.load_state_dict(saved[2])
    if loads != "before":
        restored.load_state_dict(saved[1])
        assert again.get_last_lr() == scheduler.get_last_lr()
    if loads == "after":
        again.load_state_dict(saved[2])
    if loads != "optimizer only":
        assert again.last_epoch == scheduler.last_epoch == 4
    a = train(model, optimizer, x, y, BATCHES[4:])
    assert torch.equal(a, train(other, restored, x, y, BATCHES[4:]))
    assert again.get_last_lr() == scheduler.get_last_lr()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda parts: pickle.loads(pickle.dumps(parts))])
def test_copies_follow_their_own_optimizer(copied):
    model, x, y, optimizer = start()
    scheduler = ExampleLR(optimizer, SCHEDULE)
    train(model, optimizer, x, y, BATCHES[:4])
    other, theirs, their_scheduler = copied((model, optimizer, scheduler))
    assert their_scheduler.optimizer is theirs
    ours = scheduler.get_last_lr()
    b = train(other, theirs, x, y, BATCHES[4:])
    assert scheduler.get_last_lr() == ours != their_scheduler.get_last_lr()
    assert torch.equal(b, train(model, optimizer, x, y, BATCHES[4:]))


def test_a_skipped_step_leaves_the_schedule():
    model, x, y, optimizer = start()
    scheduler = ExampleLR(optimizer, SCHEDULE)
    train(model, optimizer, x, y, [16])
    before = scheduler.get_last_lr()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    model.zero_grad()
    scaler.scale(model(x[:8]).square().mean() * math.inf).backward()
    scaler.step(optimizer)
    assert scheduler.get_last_lr() == before
    assert optimizer.examples == 16


def test_distributed_checkpointings_empty_step_leaves_the_schedule():
    model, x, y, optimizer = start()
    scheduler = ExampleLR(optimizer, SCHEDULE)
    before = scheduler.get_last_lr()
    get_optimizer_state_dict(model, optimizer)
    assert optimizer.examples == 0
    assert scheduler.get_last_lr() == before
    train(model, optimizer, x, y, [16])
    assert scheduler.get_last_lr() == pytest.approx([0.1 * SCHEDULE.mean(0, 16)])


def test_a_learning_rate_set_by_something_else_is_refused():
    model, x, y, optimizer = start()
    ExampleLR(optimizer, SCHEDULE)
    train(model, optimizer, x, y, [16])
    exponential = ExponentialLR(optimizer, 0.9)
    train(model, optimizer, x, y, [16])
    exponential.step()
    with pytest.raises(GradstatsError, match=r"lr of group 0 was .* compose schedules with then"):
        train(model, optimizer, x, y, [16])
    assert optimizer.examples == 32


def test_initial_lr_changes_a_schedule_under_way():
    model, x, y, optimizer = start()
    scheduler = ExampleLR(optimizer, SCHEDULE)
    train(model, optimizer, x, y, [16])
    optimizer.param_groups[0]["initial_lr"] *= 0.5
    train(model, optimizer, x, y, [16])
    assert scheduler.get_last_lr() == pytest.approx([0.05 * SCHEDULE.mean(16, 32)])


def test_a_converted_optimizer_takes_a_schedule():
    model, x, y, optimizer = start()
    ExampleLR(optimizer, SCHEDULE)
    train(model, optimizer, x, y, [16] * 12)
    converted = from_torch(to_torch(optimizer, 64), batch_size=64)
    assert converted.param_groups[0]["lr"] != optimizer.param_groups[0]["lr"]
    scheduler = ExampleLR(converted, SCHEDULE)
    train(model, converted, x, y, [16])
    assert scheduler.get_last_lr() == pytest.approx([converted.param_groups[0]["initial_lr"] * SCHEDULE.mean(192, 208)])


def test_one_schedule_an_optimizer():
    _, _, _, optimizer = start()
    ExampleLR(optimizer, SCHEDULE)
    with pytest.raises(GradstatsError, match="follows a schedule already"):
        ExampleLR(optimizer, SCHEDULE)


def test_torch_cannot_put_it_in_a_sequence():
    model, x, y, optimizer = start()
    scheduler = ExampleLR(optimizer, SCHEDULE)
    sequence = SequentialLR(optimizer, [LambdaLR(optimizer, lambda step: 1.0), scheduler], milestones=[1])
    with pytest.raises(GradstatsError, match="compose schedules with then"):
        train(model, optimizer, x, y, [16])
    with pytest.raises(GradstatsError, match=r"compose with then\(\) rather than SequentialLR"):
        sequence.step()


def test_torchs_optimizers_take_the_schedule_through_lambda_lr():
    model, x, y = problem()
    adam = torch.optim.Adam(model.parameters(), lr=0.1)
    with pytest.raises(GradstatsError, match="Adam does not count examples: .* LambdaLR"):
        ExampleLR(adam, SCHEDULE)
    b = 16
    scheduler = LambdaLR(adam, lambda step: SCHEDULE.mean(step * b, (step + 1) * b))
    seen = []
    train(model, adam, x, y, [b] * 10, before=lambda: seen.append(scheduler.get_last_lr()[0]), after=scheduler.step)
    other, _, _, optimizer = start()
    ours = ExampleLR(optimizer, SCHEDULE)
    train(other, optimizer, x, y, [b] * 10, after=lambda: seen.append(ours.get_last_lr()[0]))
    assert seen[:10] == pytest.approx(seen[10:])
