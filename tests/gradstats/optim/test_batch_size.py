"""Batch sizes that change within a run: what loaders get, what checkpoints keep, and growth with the noise scale."""

import io
import math
import random
from itertools import islice, pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from gradstats import GradstatsError, MissingStatistic, attach
from gradstats.noise_scale import NoiseEstimate, estimate
from gradstats.optim import (
    AdaptiveBatchSize,
    BatchInvariantAdam,
    BatchInvariantSGD,
    Cosine,
    ExampleLR,
    ScheduledBatchSampler,
    Warmup,
)

D = torch.float64


def ramp(examples):
    return min(2 + examples // 20, 9)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("size", [1, 3, 10, 11])
def test_a_constant_size_is_torchs_batch_sampler(size, drop_last):
    ours = ScheduledBatchSampler(range(10), size, drop_last)
    theirs = BatchSampler(range(10), size, drop_last)
    for _ in range(2):
        assert len(ours) == len(theirs)
        assert list(ours) == list(theirs)


def test_sizes_follow_the_examples_drawn_over_all_epochs():
    sampler = ScheduledBatchSampler(range(45), ramp)
    e = 0
    for _ in range(4):
        foreseen, epoch = len(sampler), list(sampler)
        assert [i for batch in epoch for i in batch] == list(range(45))
        assert len(epoch) == foreseen
        for batch in epoch[:-1]:
            assert len(batch) == ramp(e)
            e += len(batch)
        e += len(epoch[-1])
        assert sampler.examples == e


def test_a_size_is_decided_when_its_batch_is_drawn():
    size = 4
    batches = iter(ScheduledBatchSampler(range(100), lambda examples: size))
    assert len(next(batches)) == 4
    size = 7
    assert len(next(batches)) == 7


def through_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@given(count=st.integers(1, 60), drawn=st.integers(1, 20), behind=st.integers(0, 2), drop_last=st.booleans())
@settings(max_examples=150, deadline=None)
def test_no_example_is_lost_or_repeated(count, drawn, behind, drop_last):
    """A run stops somewhere, trained on all batches drawn but the last few; the sampler has no seed to go by."""
    sampler = ScheduledBatchSampler(RandomSampler(range(count)), ramp, drop_last)
    epoch = iter(sampler)
    batches = list(islice(epoch, drawn))
    trained = batches[: max(len(batches) - behind, 0)]
    state = through_file(sampler.state_dict(sum(map(len, trained))))
    expected = batches[len(trained) :] + list(epoch)

    resumed = ScheduledBatchSampler(RandomSampler(range(count)), ramp, drop_last)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    foreseen, rest = len(resumed), list(resumed)
    assert foreseen == len(rest)
    if expected:
        assert rest == expected
        rest = list(resumed)
    # A new epoch
    examples = [i for batch in rest for i in batch]
    assert len(set(examples)) == len(examples) >= (len(rest) > 0 if drop_last else count)
    assert resumed.examples == sampler.examples + len(examples)


def test_a_state_outside_the_epoch_is_refused():
    sampler = ScheduledBatchSampler(range(10), 4)
    list(sampler)
    next(iter(sampler))
    assert sampler.state_dict(10)["left"] == list(range(10))
    for examples in (9, 15):
        with pytest.raises(GradstatsError, match=f"began after 10 examples, and 14 were drawn: .* from {examples}"):
            sampler.state_dict(examples)


@pytest.mark.parametrize("size", [0, -1, 2.0, "4", lambda examples: 0, lambda examples: 1.5])
def test_a_size_that_is_none_is_refused(size):
    with pytest.raises(GradstatsError, match="must be a positive integer"):
        ScheduledBatchSampler(range(10), size)


def test_workers_read_ahead_and_a_checkpoint_does_not_count_that():
    data = torch.arange(200)
    sampler = ScheduledBatchSampler(RandomSampler(data), ramp)
    loader = DataLoader(data, batch_sampler=sampler, num_workers=1, prefetch_factor=2)
    iterator = iter(loader)
    trained = [next(iterator) for _ in range(5)]
    examples = sum(map(len, trained))
    ahead = sampler.examples - examples
    assert ahead == sum(islice((len(b) for b in iterator), 2)) > 0
    state = sampler.state_dict(examples)
    rest = ScheduledBatchSampler(RandomSampler(data), ramp)
    rest.load_state_dict(state)
    seen = torch.cat([*trained, *DataLoader(data, batch_sampler=rest)])
    assert torch.equal(seen.sort().values, data)


# AdaptiveBatchSize


def measured(g):
    """What `update` reads of a handle, for per-example gradients g (B, d)."""
    total = estimate(g.mean(0).square().sum(), g.square().sum() / len(g), len(g)) if len(g) > 1 else None
    return SimpleNamespace(batch_size=len(g), gathered=True, noise_scale=SimpleNamespace(total=total))


def grow(size, total, b_simple, d=20, lr=0.0, seed=0):
    """The sizes that are used while a quadratic |p - x_b|^2/2 is descended, with x_b of mean zero: g_b = p - x_b, and
    B_simple = d sigma^2/|p|^2, as given for the p at the start."""
    generator = torch.Generator().manual_seed(seed)
    p, sigma = torch.ones(d, dtype=D), b_simple**0.5
    used, e = [], 0
    while e < total:
        b = size(e)
        g = p - sigma * torch.randn(b, d, dtype=D, generator=generator)
        size.update(measured(g))
        p = p - b * lr * g.mean(0)
        used.append(b)
        e += b
    return used


def only_by_two(sizes):
    return {b / a for a, b in pairwise(sizes)} <= {0.5, 1.0, 2.0}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("b_simple", [3, 30, 120])
def test_grows_to_the_noise_scale(b_simple, seed):
    size = AdaptiveBatchSize(4, 512, horizon=10_000)
    sizes = grow(size, 20_000, b_simple, seed=seed)
    assert only_by_two(sizes) and sizes == sorted(sizes)
    assert max(4, b_simple / 4) <= size.size <= max(4, b_simple)
    assert size(0) == size.size == sizes[-1]


@pytest.mark.parametrize(
    ("fraction", "maximum", "low", "high"), [(1.0, 50, 32, 32), (0.1, 512, 4, 12), (4.0, 512, 120, 480)]
)
def test_fraction_and_maximum(fraction, maximum, low, high):
    size = AdaptiveBatchSize(4, maximum, 10_000, fraction=fraction)
    grow(size, 30_000, b_simple=120)
    assert low <= size.size <= high


@pytest.mark.parametrize("grow_only", [True, False])
def test_follows_the_noise_down_only_where_it_may(grow_only):
    size = AdaptiveBatchSize(4, 512, horizon=6_000, grow_only=grow_only)
    largest = grow(size, 20_000, b_simple=120)[-1]
    assert largest >= 32
    sizes = grow(size, 40_000, b_simple=8)
    assert only_by_two(sizes)
    if grow_only:
        assert set(sizes) == {largest}
    else:
        assert 4 <= sizes[-1] <= 16


def test_grows_as_a_quadratic_is_descended():
    """To the noise scale of the stationary state, 2/lr for a quadratic and an example's learning rate lr."""
    size = AdaptiveBatchSize(4, 4096, horizon=50_000)
    sizes = grow(size, 200_000, b_simple=8, lr=0.004)
    assert only_by_two(sizes) and sizes == sorted(sizes)
    assert sizes[0] == 4
    assert 0.004 * sizes[-1] == pytest.approx(0.5 * 2, rel=0.6)


def certain(size, b_simple, steps):
    """The sizes where hardly any scatter leaves a doubt about the noise scale."""
    used = []
    for i in range(steps):
        used.append(size(0))
        total = NoiseEstimate(torch.tensor(1 + 1e-3 * (-1) ** i), torch.tensor(float(b_simple)))
        size.update(SimpleNamespace(batch_size=used[-1], gathered=True, noise_scale=SimpleNamespace(total=total)))
    return used


def test_waits_for_ten_batches_of_its_size():
    assert certain(AdaptiveBatchSize(8, 64, 10_000), 1_000, 22) == [8] * 10 + [16] * 5 + [32] * 5 + [64] * 2


def test_is_halved_below_half_its_size_down_to_the_minimum():
    size = AdaptiveBatchSize(8, 64, 1_000, grow_only=False)
    assert certain(size, 65, 30)[-1] == 64
    assert set(certain(size, 34, 200)) == {64}
    assert sorted(set(certain(size, 17, 200))) == [32, 64]
    assert sorted(set(certain(size, 1, 2_000))) == [8, 16, 32]


def test_batches_that_say_nothing_are_passed_over():
    size = AdaptiveBatchSize(4, 512, 10_000)
    size.update(measured(torch.ones(1, 20, dtype=D)))
    size.update(measured(torch.full((4, 20), math.inf, dtype=D)))
    assert size.noise.examples == 0


def test_a_checkpoint_continues_the_sizes():
    size = AdaptiveBatchSize(4, 512, 10_000)
    grow(size, 700, b_simple=120)
    other = AdaptiveBatchSize(4, 512, 10_000)
    other.load_state_dict(through_file(size.state_dict()))
    a, b = (grow(s, 5_000, b_simple=120, seed=1) for s in (size, other))
    assert a == b and 4 < a[0] < a[-1]


class Quadratic(nn.Module):
    def __init__(self):
        super().__init__()
        self.p = nn.Parameter(torch.ones(20, dtype=D))

    def forward(self, x):
        return (self.p - x).square().sum(-1) / 2


def test_reads_the_statistics_of_a_model():
    model = Quadratic()
    stats = attach(model, "noise_scale")
    ours, theirs = AdaptiveBatchSize(4, 512, 10_000), AdaptiveBatchSize(4, 512, 10_000)
    for _ in range(12):
        x = 10 * torch.randn(4, 20, dtype=D)
        model.zero_grad()
        model(x).mean().backward()
        ours.update(stats)
        theirs.update(measured(model.p.detach() - x))
    assert ours.noise.simple == pytest.approx(theirs.noise.simple)
    assert ours.size == theirs.size


def test_what_it_cannot_work_with_is_refused():
    for args in ((1, 8, 1_000), (16, 8, 1_000), (4, 512, 5_000), (4, 8, 1_000, 0.0)):
        with pytest.raises(GradstatsError):
            AdaptiveBatchSize(*args)
    model = Quadratic()
    stats = attach(model, "second_moment")
    model(torch.ones(4, 20, dtype=D)).mean().backward()
    with pytest.raises(MissingStatistic, match="was not collected"):
        AdaptiveBatchSize(4, 8, 1_000).update(stats)


# The learning curve

TOTAL = 2_048
CONSTANT = [lambda e, rng: 4, lambda e, rng: 16, lambda e, rng: 64]
VARYING = [
    lambda e, rng: 4 * 2 ** (5 * e // TOTAL),  # a ramp up
    lambda e, rng: 64 // 2 ** (5 * e // TOTAL),  # and down
    lambda e, rng: rng.randint(4, 64),
    lambda e, rng: rng.choice([4, 8, 16, 32, 64]),
]


def curve(make, size):
    """ln loss at common counts of examples, on a convex problem, in the same order for all."""
    torch.manual_seed(0)
    x = torch.randn(TOTAL, 20, dtype=D)
    y = (x @ torch.randn(20, 10, dtype=D) + 3 * torch.randn(TOTAL, 10, dtype=D)).argmax(1)
    model = nn.Linear(20, 10, dtype=D)
    attach(model)
    optimizer = make(model.parameters())
    ExampleLR(optimizer, Warmup(TOTAL // 8).then(Cosine(7 * TOTAL // 8)))
    rng, e, values = random.Random(0), 0, []
    for stop in (TOTAL // 8, TOTAL // 4, TOTAL // 2, 3 * TOTAL // 4, TOTAL):
        while e < stop:
            rows = slice(e, min(e + size(e, rng), stop))
            model.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
            e = rows.stop
        values.append(F.cross_entropy(model(x), y).log().detach())
    return torch.stack(values)


@pytest.mark.parametrize(
    ("make", "largest"),
    [
        # The default estimator for R > B is the noisiest.
        (lambda ps: BatchInvariantAdam(ps, lr=0.01, batch_size=16), 0.005),
        (lambda ps: BatchInvariantAdam(ps, lr=0.01, batch_size=16, estimator="running_average"), 0.004),
        (lambda ps: BatchInvariantSGD(ps, lr=0.1, momentum=0.9, batch_size=16), 0.004),
    ],
    ids=["adam", "adam with the running average", "sgd"],
)
def test_the_learning_curve_does_not_notice(make, largest):
    """The score (mean of the standard deviations of ln loss) over constant and varying batch sizes is within 20% of
    that over constant ones."""
    constant, varying = ([curve(make, size) for size in sizes] for sizes in (CONSTANT, VARYING))
    scores = [torch.stack(curves).std(0).mean() for curves in (constant, constant + varying)]
    assert 0 < scores[1] < 1.2 * scores[0]
    assert scores[0] < largest
    fall = constant[0][0] - constant[0][-1]
    assert fall > 50 * largest
