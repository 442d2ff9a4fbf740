"""FSDP2: what a window of a sharded model is over, and what is done to its gradient."""

import warnings

import pytest
import torch
import torch.distributed as dist

import gradstats
from gradstats.errors import LifetimeError
from gradstats.optim import BatchInvariantAdam
from tests.gradstats.distributed.sharding import (
    B,
    apart,
    batches,
    distance,
    loss_of,
    made,
    mine,
    pair,
    parameters_apart,
)

CLOSE = 1e-12
ALL = ("second_moment", "variance", "norms", "max_abs")


def backward(model, batch, share=mine, weight=1.0):
    x, y = batch
    (loss_of(model(share(x)), share(y)) * weight).backward()


def whole_batch(t):
    return t


# Batches


def of_unequal_sizes(name):
    """Losses times W B_r / B are those of one process. The last rank has one example."""
    model, alone, stats, expected = pair(name, *ALL)
    size = dist.get_world_size()
    sizes = [B - size + 1, *[1] * (size - 1)]
    x, y = next(batches(name, 1))
    own_x, own_y = (t.split(sizes)[dist.get_rank()] for t in (x, y))
    (loss_of(model(own_x), own_y) * size * len(own_x) / B).backward()
    backward(alone, (x, y), whole_batch)
    with pytest.warns(UserWarning, match="fully_shard .* W B_r / B"):
        assert stats.batch_size == B
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert stats.batch_size == B  # once
        return apart(stats, expected, *ALL)


@pytest.mark.parametrize("name", ["mlp", "gpt"])
def test_unequal_batches(two, name):
    assert max(two(of_unequal_sizes, name)) <= CLOSE


@pytest.mark.slow
def test_unequal_batches_of_four(four):
    assert max(four(of_unequal_sizes, "gpt")) <= CLOSE


def summed(factor):
    """FSDP averages sums of losses, unless it is told not to."""
    model, alone, stats, expected = pair("mlp", *ALL, attachment={"loss_reduction": "sum"})
    if factor is not None:
        for module in (model, model[2]):
            module.set_gradient_divide_factor(factor)
    x, y = next(batches("mlp", 1))
    weight = dist.get_world_size() if factor is None else factor
    (loss_of(model(mine(x)), mine(y), "sum") * weight).backward()
    loss_of(alone(x), y, "sum").backward()
    return apart(stats, expected, *ALL)


@pytest.mark.parametrize("factor", [None, 1.0, 3.0])
def test_what_the_sum_over_ranks_is_divided_by(two, factor):
    assert max(two(summed, factor)) <= CLOSE


def divided_unevenly():
    model, _, stats, _ = pair("mlp")
    model.set_gradient_divide_factor(1.0)  # not that of the block inside
    backward(model, next(batches("mlp", 1)))
    with pytest.raises(gradstats.GradstatsError, match="set_gradient_divide_factor differs"):
        _ = stats.second_moment["0.weight"]


def test_different_factors_are_refused(two):
    two(divided_unevenly)


# Accumulation


def accumulated(name, synchronised):
    model, alone, stats, expected = pair(name, *ALL)
    optimizers = [BatchInvariantAdam(m.parameters(), lr=0.01, batch_size=16) for m in (model, alone)]
    every, largest = list(batches(name, 6)), 0.0
    for step in range(2):
        for i in range(3):
            model.set_requires_gradient_sync(synchronised or i == 2)
            backward(model, every[3 * step + i], weight=1 / 3)
            backward(alone, every[3 * step + i], whole_batch, weight=1 / 3)
        assert stats.batch_size == expected.batch_size == 3 * B
        largest = max(largest, apart(stats, expected, *ALL))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return max(largest, parameters_apart(model, alone))


@pytest.mark.parametrize("synchronised", [True, False])
def test_accumulation(two, synchronised):
    assert max(two(accumulated, "gpt", synchronised)) <= 1e-9


def zeroed_in_place(zero):
    model, alone, stats, expected = pair("mlp", *ALL)
    largest = 0.0
    for batch in batches("mlp", 3):
        backward(model, batch)
        backward(alone, batch, whole_batch)
        assert stats.batch_size == B
        largest = max(largest, apart(stats, expected, *ALL))
        zero(model)
        alone.zero_grad()
    return largest


def by_zero_grad(model):
    model.zero_grad(set_to_none=False)


def without_a_mark(model):
    torch._foreach_zero_([p.grad for p in model.parameters()])


@pytest.mark.parametrize("zero", [by_zero_grad, without_a_mark])
def test_gradients_zeroed_in_place_begin_a_window(two, zero):
    assert max(two(zeroed_in_place, zero)) <= CLOSE


def two_forwards():
    model, alone, stats, expected = pair("mlp", *ALL)
    first, second = batches("mlp", 2)
    for m, handle, share in ((model, stats, mine), (alone, expected, whole_batch)):
        loss = loss_of(m(share(first[0])), share(first[1]))
        handle.new_examples()
        ((loss + loss_of(m(share(second[0])), share(second[1]))) / 2).backward()
    assert stats.batch_size == 2 * B
    return apart(stats, expected, *ALL)


def test_two_forwards_before_a_backward(two):
    assert max(two(two_forwards)) <= CLOSE


def not_resharded():
    """The module keeps the whole parameter after the backward pass; the optimizer and readers have the sharded one."""
    model, alone, stats, expected = pair("mlp", *ALL)
    optimizers = [BatchInvariantAdam(m.parameters(), lr=0.01, batch_size=16) for m in (model, alone)]
    model.set_reshard_after_backward(False)
    largest = 0.0
    for batch in batches("mlp", 2):
        backward(model, batch)
        backward(alone, batch, whole_batch)
        largest = max(largest, apart(stats, expected, *ALL))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for module in (model, model[2]):
            module.reshard()
    return max(largest, parameters_apart(model, alone))


def test_parameters_that_stay_whole(two):
    assert max(two(not_resharded)) <= CLOSE


# What FSDP keeps is part of no window


def kept_from_before_attach():
    model, _ = made("mlp")
    every = list(batches("mlp", 3))
    model.set_requires_gradient_sync(False)
    backward(model, every[0])
    model.set_requires_gradient_sync(True)
    stats = gradstats.attach(model)
    backward(model, every[1])
    refused_once(model, stats, every[2])


def zeroed_while_kept():
    model, _, stats, _ = pair("mlp")
    every = list(batches("mlp", 3))
    model.set_requires_gradient_sync(False)
    backward(model, every[0])
    model.set_requires_gradient_sync(True)
    stats.zero()
    backward(model, every[1])
    refused_once(model, stats, every[2])


def sharded_gradient_dropped_while_kept():
    sharded_gradient_zeroed_while_kept(set_to_none=True)


def sharded_gradient_zeroed_while_kept(set_to_none=False):
    model, _, stats, _ = pair("mlp")
    every = list(batches("mlp", 4))
    backward(model, every[0])
    model.set_requires_gradient_sync(False)
    backward(model, every[1])
    model.zero_grad(set_to_none)
    model.set_requires_gradient_sync(True)
    backward(model, every[2])
    refused_once(model, stats, every[3])


def refused_once(model, stats, batch):
    """Until a window begins in which all was seen."""
    with pytest.raises(LifetimeError, match="holds more"):
        _ = stats.second_moment["0.weight"]
    model.zero_grad()
    backward(model, batch)
    assert stats.second_moment["0.weight"].shape == (7, 5)


KEPT = [
    *(kept_from_before_attach, zeroed_while_kept),
    *(sharded_gradient_dropped_while_kept, sharded_gradient_zeroed_while_kept),
]


@pytest.mark.parametrize("case", KEPT)
def test_gradients_that_fsdp_keeps(two, case):
    two(case)


class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, d):
        raise RuntimeError("as meant")


def cut_short():
    """FSDP keeps what it has not reduced, and nothing drops it."""
    model, _, _, _ = pair("mlp")
    every = list(batches("mlp", 2))
    handle = model[2].register_forward_pre_hook(lambda module, inputs: Fails.apply(inputs[0]))
    with pytest.raises(RuntimeError, match="as meant"):
        backward(model, every[0])
    handle.remove()
    model.reset_iter_state()
    model.zero_grad()
    with pytest.raises(LifetimeError, match="cut short"):
        backward(model, every[1])


@pytest.mark.skipif(torch.__version__ < "2.13", reason="FSDP cannot go on after an exception")
def test_a_backward_pass_that_was_cut_short(two):
    two(cut_short)


# Changed gradients


def clipped():
    model, alone, stats, expected = pair("mlp", *ALL)
    batch = next(batches("mlp", 1))
    backward(model, batch)
    backward(alone, batch, whole_batch)
    norms = stats.clip_grad_norm_(0.01), expected.clip_grad_norm_(0.01)
    return max(distance(*norms), apart(stats, expected, *ALL))


def test_clipping_that_statistics_follow(two):
    assert max(two(clipped)) <= CLOSE


def clipped_by_torch():
    """By operations that leave no mark on a DTensor."""
    model, _, stats, _ = pair("mlp", *ALL)
    optimizer = BatchInvariantAdam(model.parameters(), batch_size=16)
    backward(model, next(batches("mlp", 1)))
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    with pytest.raises(LifetimeError, match="changed in place"):
        _ = stats.variance["0.weight"]
    with pytest.raises(LifetimeError, match="changed in place"):
        optimizer.step()


def test_clipping_by_torch_is_seen(two):
    two(clipped_by_torch)


def bounded():
    model, alone, *_ = pair("mlp")
    optimizers = [BatchInvariantAdam(m.parameters(), lr=0.01, batch_size=16, max_norm=0.01) for m in (model, alone)]
    for batch in batches("mlp", 3):
        backward(model, batch)
        backward(alone, batch, whole_batch)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return parameters_apart(model, alone)


def test_max_norm_is_over_all_shards(two):
    assert max(two(bounded)) <= CLOSE


# A part of what is seen


def every_second():
    model, alone, stats, _ = pair("mlp", "second_moment", attachment={"every": 2})
    optimizers = [BatchInvariantAdam(m.parameters(), lr=0.01, batch_size=16) for m in (model, alone)]
    gathered = []
    for batch in batches("mlp", 4):
        backward(model, batch)
        backward(alone, batch, whole_batch)
        gathered.append(stats.gathered)
        assert stats.batch_size == B
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert gathered == [True, False] * 2
    return parameters_apart(model, alone)


def test_every_second_window(two):
    assert max(two(every_second)) <= CLOSE


def half():
    """Each rank draws among its own examples: the mean of what it would have by itself."""
    model, alone, stats, own = pair("mlp", "second_moment", attachment={"fraction": 0.5})
    batch = next(batches("mlp", 1))
    backward(model, batch)
    backward(alone, batch)
    largest = 0.0
    for p in own.second_moment:
        mean = own.second_moment[p].clone()
        dist.all_reduce(mean)
        largest = max(largest, distance(stats.second_moment[p], mean / dist.get_world_size()))
    return largest


def test_a_fraction_of_the_examples(two):
    assert max(two(half)) <= CLOSE
