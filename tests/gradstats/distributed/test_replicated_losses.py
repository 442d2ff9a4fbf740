"""What the average of the ranks' losses is, for which number of examples on each."""

from contextlib import nullcontext

import pytest
import torch

import gradstats
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


def weighed(sizes, reduction):
    """Each rank has its own number of examples, and multiplies its loss so that the average is that of all."""
    _, ranks = rank_of()
    model, x, y = problem()
    ddp = ddp_of(model)
    stats = gradstats.attach(ddp, *STATISTICS, loss_reduction=reduction)
    total = sum(sizes)
    for _ in range(2):
        ddp.zero_grad()
        own = share(x[:total], sizes)
        with (
            pytest.warns(UserWarning, match="W B_r / B")
            if reduction == "mean" and not stats.batch_size
            else nullcontext()
        ):
            loss = loss_of(ddp(own), share(y[:total], sizes), "sum")
            (loss * ranks / (total if reduction == "mean" else 1)).backward()
        check_equal(read(stats), of_one_process("mlp", total, loss_reduction=reduction))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("sizes", [(5, 3), (1, 7), (8, 0), (0, 3)])
def test_unequal_batches(two, sizes, reduction):
    two(weighed, sizes, reduction)


@pytest.mark.slow
def test_unequal_batches_of_four(four):
    four(weighed, (3, 2, 1, 0), "mean")


def token_mean():
    """Sentences of uneven lengths: W/T times the sum over a rank's tokens, T those of all ranks."""
    model, x, y = problem("gpt")
    y = y.where(torch.arange(5) < torch.randint(1, 6, (len(y), 1)), -100)
    ddp = ddp_of(model)
    stats = gradstats.attach(ddp, *FEW)
    tokens = int((y[:8] != -100).sum())
    (loss_of(ddp(share(x[:8])), share(y[:8]), "sum") * rank_of()[1] / tokens).backward()
    alone, *_ = problem("gpt")
    expected = gradstats.attach(alone, *FEW)
    loss_of(alone(x[:8]), y[:8]).backward()
    check_equal(read(stats, FEW), read(expected, FEW))


def test_mean_over_tokens(two):
    two(token_mean)


def any_loss():
    """Statistics are those of one process that backpropagates (1/W) sum_r L_r, whatever the L_r."""
    model, x, y = problem()
    ddp = ddp_of(model)
    stats = gradstats.attach(ddp, *STATISTICS)
    with pytest.warns(UserWarning, match="5, 3 examples"):
        loss_of(ddp(share(x[:8], (5, 3))), share(y[:8], (5, 3))).backward()
    alone, *_ = problem()
    expected = gradstats.attach(alone, *STATISTICS)
    output = alone(x[:8])
    ((loss_of(output[:5], y[:5]) + loss_of(output[5:], y[5:8])) / 2).backward()
    check_equal(read(stats), read(expected))


def test_means_of_unequal_batches(two):
    two(any_loss)
