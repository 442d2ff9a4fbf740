"""What ranks send each other and when, and which backward passes are in it."""

import copy
import warnings
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

import gradstats
from gradstats.errors import GradstatsError, LifetimeError
from tests.gradstats.distributed.replicas import (
    FEW,
    STATISTICS,
    check_equal,
    ddp_of,
    loss_of,
    of_one_process,
    problem,
    rank_of,
    read,
    share,
)


def sent(statistics, hook=False, buckets=1, dtype=torch.float64, every=1):
    """What a step sends: how many numbers every collective of ours has, and what the process groups were asked for."""
    model, x, y = problem("mlp", dtype)
    ddp = DistributedDataParallel(model) if buckets == 1 else ddp_of(model)
    if hook:
        ddp.register_comm_hook(None, allreduce_hook)
    if statistics:
        gradstats.attach(ddp, *statistics, every=every)
    sizes = []

    def step():
        ddp.zero_grad()
        loss_of(ddp(share(x[:8])), share(y[:8])).backward()

    def noted(original):
        def collective(*args, **kwargs):
            sizes.append(sum(t.numel() for t in args if isinstance(t, torch.Tensor)))
            return original(*args, **kwargs)

        return collective

    step()
    step()
    with pytest.MonkeyPatch.context() as patch, profile(activities=[ProfilerActivity.CPU], acc_events=True) as recorded:
        for name in ("all_reduce", "all_gather"):
            patch.setattr(dist, name, noted(getattr(dist, name)))
        step()
    return sizes, [event.name for event in recorded.events() if event.name.startswith("c10d::")]


ELEMENTS = 6 * 8 + 8 + 8 + 8 + 8 * 3 + 3
COUNTS = 2 * (3 + 6)  # of two ranks: three of the window, and one of every parameter


@pytest.mark.parametrize("buckets", [1, 3])
def test_second_moments_go_with_the_gradients(two, buckets):
    """No collective more, and as many numbers again; beside them, how much every rank has backpropagated."""
    ((sizes, names), _) = two(sent, ("second_moment",), False, buckets)
    assert names == ["c10d::allreduce_"] * buckets
    assert sum(sizes) == 2 * ELEMENTS + COUNTS


def test_what_is_no_sum_takes_one_collective_more(two):
    ((_, names), _) = two(sent, ("second_moment", "norms", "max_abs"))
    assert names == ["c10d::allreduce_", "c10d::allgather_"]


def test_beside_the_users_hook_all_sums_take_one(two):
    ((sizes, names), _) = two(sent, ("second_moment", "abs_mean"), True)
    assert names == ["c10d::allreduce_"] * 2
    assert sizes == [ELEMENTS, 2 * ELEMENTS + COUNTS]


def test_sums_in_another_dtype_follow_the_gradients(two):
    ((sizes, _), _) = two(sent, ("second_moment",), False, 1, torch.bfloat16)
    assert sizes == [ELEMENTS, ELEMENTS + COUNTS]


@pytest.mark.parametrize(("every", "sizes"), [(2, [ELEMENTS + COUNTS, ELEMENTS]), (3, [ELEMENTS + COUNTS])])
def test_windows_without_statistics_send_counts_alone(two, every, sizes):
    """What is looked at is the third window."""
    ((found, _), _) = two(sent, ("second_moment",), False, 1, torch.float64, every)
    assert found == sizes


def test_without_statistics(two):
    ((_, names), _) = two(sent, ())
    assert names == ["c10d::allreduce_"]


class Late(nn.Module):
    """Its backward accumulates two gradients before the shadows' of a second statistic: nn.LSTM's four parameters."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(6, 4, batch_first=True)

    def forward(self, x):
        return self.lstm(x.unsqueeze(1))[0][:, 0, :3]


def sums_are_complete_when_gradients_are():
    """Autograd accumulates the leaves of one Function in an order of its own, whatever that of its arguments."""
    torch.manual_seed(0)
    models = [Late().double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    _, x, y = problem()
    ddp = DistributedDataParallel(models[0], bucket_cap_mb=1e-5)  # every parameter has a bucket of its own
    stats, alone = (gradstats.attach(m, "second_moment", "abs_mean", "sign_mean") for m in (ddp, models[1]))
    loss_of(models[1](x[:8]), y[:8]).backward()
    for _ in range(2):
        ddp.zero_grad()
        loss_of(ddp(share(x[:8])), share(y[:8])).backward()
        check_equal(read(stats, stats.statistics), read(alone, stats.statistics))


def test_sums_are_complete_when_gradients_are(two):
    two(sums_are_complete_when_gradients_are)


def one_rank_reads():
    model, x, y = problem()
    ddp = ddp_of(model)
    stats = gradstats.attach(ddp, *STATISTICS)
    loss_of(ddp(share(x[:8])), share(y[:8])).backward()
    if rank_of()[0] == 0:
        check_equal(read(stats), of_one_process("mlp"))


def test_reading_does_not_communicate(two):
    two(one_rank_reads)


def accumulated(syncs, hook=False, set_to_none=True, options=None):
    """Four micro-batches, and which of them average gradients: whatever was averaged before must not be again."""
    model, x, y = problem()
    ddp = ddp_of(model, **(options or {}))
    if hook:
        ddp.register_comm_hook(None, allreduce_hook)
    stats = gradstats.attach(ddp, *STATISTICS)
    alone, *_ = problem()
    expected = gradstats.attach(alone, *STATISTICS)
    for _ in range(2):
        ddp.zero_grad(set_to_none)
        alone.zero_grad()
        order = []
        for i, sync in enumerate(syncs):
            rows = torch.arange(8 * i, 8 * i + 8)
            with nullcontext() if sync else ddp.no_sync():
                (loss_of(ddp(share(x[rows])), share(y[rows])) / len(syncs)).backward()
            order.append(rows)
        # Of every exchange, the examples of rank 0 come first.
        begin = 0
        for i, sync in enumerate(syncs):
            if sync:
                halves = [torch.cat([rows[4 * r : 4 * r + 4] for rows in order[begin : i + 1]]) for r in (0, 1)]
                seen = torch.cat(halves)
                (loss_of(alone(x[seen]), y[seen]) * (len(seen) / (8 * len(syncs)))).backward()
                begin = i + 1
        check_equal(read(stats), read(expected))


@pytest.mark.parametrize("syncs", [(False, False, False, True), (True, True), (False, True, True), (True, False, True)])
def test_accumulation(two, syncs):
    two(accumulated, syncs)


def test_accumulation_beside_the_users_hook(two):
    two(accumulated, (False, True, False, True), True)


@pytest.mark.parametrize("hook", [False, True])
@pytest.mark.parametrize("syncs", [(False, False, True), (True, False, False, True)])
def test_accumulation_in_views_of_a_bucket(two, syncs, hook):
    """Which share one version: what changes one gradient in place leaves its mark on all of them."""
    two(accumulated, syncs, hook, False, {"gradient_as_bucket_view": True})


def changed_in_views(syncs):
    """By hand between two backward passes; after the first that averages them, DDP moves gradients."""
    model, x, y = problem()
    ddp = ddp_of(model, gradient_as_bucket_view=True)
    stats = gradstats.attach(ddp, *STATISTICS)
    for i, sync in enumerate(syncs):
        if i == 1:
            for p in model.parameters():
                p.grad.mul_(0.5)
        with nullcontext() if sync else ddp.no_sync():
            loss_of(ddp(share(x[:8])), share(y[:8])).backward()
    with pytest.raises(LifetimeError, match="was changed between two backward passes"):
        stats.second_moment["0.weight"]


@pytest.mark.parametrize("syncs", [(True, True), (False, True)])
def test_a_gradient_that_was_changed_in_a_bucket(two, syncs):
    two(changed_in_views, syncs)


def hooked_in_views(factor):
    """By a hook of the user's, in a pass that does not average."""
    model, x, y = problem()
    ddp = ddp_of(model, gradient_as_bucket_view=True)
    stats = gradstats.attach(ddp, "variance")

    def change(p):
        p.grad.mul_(factor)

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(change)
    with ddp.no_sync():
        loss_of(ddp(share(x[:8])), share(y[:8])).backward()
    with nullcontext() if factor == 1 else pytest.raises(LifetimeError, match="was changed in place"):
        stats.variance["0.weight"]


@pytest.mark.parametrize("factor", [1, 0.5])
def test_a_gradient_that_a_hook_changes_in_a_bucket(two, factor):
    two(hooked_in_views, factor)


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x, names):
        return sum(getattr(self, name)(x) for name in names)


def branches(engine, views, zeroed, passes):
    """The examples behind the first branch's weight, whose gradient is zeroed in place before a pass that is not
    averaged and does not reach it, and what its statistics make of them."""
    torch.manual_seed(0)
    model, (_, x, y) = Branches().double(), problem()
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=views, find_unused_parameters=True)
    options = {} if engine == "fused" else {"engine": engine}
    stats = gradstats.attach(ddp, "second_moment", **options)
    for i, names in enumerate(passes):
        if i == 1:
            for name in zeroed:
                getattr(model, name).zero_grad(set_to_none=False)
        rows = torch.arange(8 * i, 8 * i + 8)
        with ddp.no_sync() if i == 1 else nullcontext():
            loss_of(ddp(share(x[rows]), names), share(y[rows])).backward()
    return stats.window("first.weight", ["sum_of_squares"]).batch_size, stats.second_moment["first.weight"]


BOTH = ("first", "second")


@pytest.mark.parametrize(
    ("engine", "zeroed", "last"), [("fused", BOTH, ("first",)), ("microbatch", ("first",), BOTH)], ids=str
)
def test_zeroed_in_a_bucket_before_a_pass_that_does_not_reach_it(two, engine, zeroed, last):
    """It is zeroed still when that pass is over."""
    passes = (BOTH, ("second",), last)
    with_views, without = (two(branches, engine, views, zeroed, passes)[0] for views in (True, False))
    assert with_views[0] == without[0]
    assert torch.equal(with_views[1], without[1])


def unshared():
    model, x, y = problem()
    ddp = ddp_of(model)
    stats = gradstats.attach(ddp, *STATISTICS)
    with ddp.no_sync():
        loss_of(ddp(share(x[:8])), share(y[:8])).backward()
    alone, *_ = problem()
    own = gradstats.attach(alone, *STATISTICS)
    loss_of(alone(share(x[:8])), share(y[:8])).backward()
    check_equal(read(stats), read(own))  # as the gradient is this rank's own
    ddp.zero_grad()
    loss_of(ddp(share(x[:8])), share(y[:8])).backward()
    with ddp.no_sync():
        loss_of(ddp(share(x[:8])), share(y[:8])).backward()
    with pytest.raises(LifetimeError, match="average of 2 ranks and.*no_sync"):
        stats.second_moment["0.weight"]


def test_a_rank_by_itself(two):
    two(unshared)


def joined():
    """Rank 1 has one batch, rank 0 has three; DDP divides by the number of all ranks, and so does the loss."""
    model, x, y = problem()
    ddp = ddp_of(model)
    stats = gradstats.attach(ddp, *FEW[:2])
    alone, *_ = problem()
    expected = gradstats.attach(alone, *FEW[:2])
    rank, _ = rank_of()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected uneven inputs|the ranks of Dist|You passed `throw_on")
        with Join([ddp]):
            for i in range(1 if rank else 3):
                rows = torch.arange(8 * i, 8 * i + 8)
                ddp.zero_grad()
                alone.zero_grad()
                loss_of(ddp(share(x[rows])), share(y[rows])).backward()
                rows = rows if i == 0 else share(rows)
                (loss_of(alone(x[rows]), y[rows]) * len(rows) / 8).backward()
                check_equal(read(stats, FEW[:2]), read(expected, FEW[:2]))


def test_join(two):
    two(joined)


def refused_within_join(statistics, message, **options):
    model, x, _ = problem()
    ddp = ddp_of(model)
    gradstats.attach(ddp, *statistics)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected uneven inputs|You passed `throw_on")
        with pytest.raises(GradstatsError, match=message), Join([ddp], **options):
            ddp(share(x[:8]))


def test_join_with_norms_is_refused(two):
    two(refused_within_join, FEW, r"torch's Join.*sums over examples")


def joined_among_those_left():
    """DDP's own division by the number of ranks that are left is not that of a communication hook."""
    refused_within_join(FEW[:2], "divide_by_initial_world_size=False", divide_by_initial_world_size=False)


def test_a_mean_over_the_ranks_that_are_left_is_refused(two):
    two(joined_among_those_left)


def wrapped_again():
    model, x, y = problem()
    stats = gradstats.attach(model, *FEW)
    expected = of_one_process("mlp")
    for _ in range(2):
        ddp = ddp_of(model)
        ddp.zero_grad()
        loss_of(ddp(share(x[:8])), share(y[:8])).backward()
        check_equal(read(stats, FEW), {key: value for key, value in expected.items() if key[0] in (*FEW, "batch_size")})


def test_wrapped_in_another(two):
    two(wrapped_again)


def copied():
    model, x, y = problem()
    ddp = ddp_of(model)
    gradstats.attach(ddp, *FEW)
    loss_of(ddp(share(x[:8])), share(y[:8])).backward()
    for other in (copy.deepcopy(ddp), copy.deepcopy(ddp.module)):
        replicated = isinstance(other, DistributedDataParallel)
        other.zero_grad()
        loss_of(other(share(x[:8]) if replicated else x[:8]), share(y[:8]) if replicated else y[:8]).backward()
        found = read(gradstats.attached(other), FEW[:3])
        expected = of_one_process("mlp")
        check_equal(found, {key: expected[key] for key in found})


def test_copies(two):
    two(copied)
