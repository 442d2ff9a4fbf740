"""Options of attach under DistributedDataParallel, other engines, refusals."""

from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import gradstats
from gradstats.errors import CoverageError, GradstatsError, LifetimeError
from tests.gradstats.distributed.replicas import (
    FEW,
    check_equal,
    ddp_of,
    loss_of,
    of_one_process,
    ours,
    problem,
    read,
    share,
    vector,
)


def under_a_scaler(follow):
    """Unscaled by hand, or by the scaler's step; statistics are those of the loss itself."""
    model, x, y = problem()
    ddp = ddp_of(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1)
    stats = gradstats.attach(ddp, *FEW, grad_scaler=scaler if follow else None)
    alone, *_ = problem()
    expected = gradstats.attach(alone, *FEW)
    optimizers = ours(model), ours(alone)
    for step in range(3):
        rows = torch.arange(8 * step, 8 * step + 8)
        ddp.zero_grad()
        alone.zero_grad()
        scaler.scale(loss_of(ddp(share(x[rows])), share(y[rows]))).backward()
        loss_of(alone(x[rows]), y[rows]).backward()
        if follow:
            check_equal(read(stats, FEW), read(expected, FEW))
            scaler.unscale_(optimizers[0])
            check_equal(read(stats, FEW), read(expected, FEW))
        scaler.step(optimizers[0])
        scaler.update()
        optimizers[1].step()
    assert (vector(model) - vector(alone)).norm() <= 1e-9 * vector(alone).norm()


@pytest.mark.parametrize("follow", [False, True])
def test_grad_scaler(two, follow):
    two(under_a_scaler, follow)


def clipped(follow):
    model, x, y = problem()
    ddp = ddp_of(model)
    stats = gradstats.attach(ddp, *FEW, follow_clipping=follow)
    alone, *_ = problem()
    expected = gradstats.attach(alone, *FEW)
    loss_of(ddp(share(x[:8])), share(y[:8])).backward()
    loss_of(alone(x[:8]), y[:8]).backward()
    if follow:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    else:
        stats.clip_grad_norm_(0.1)
    assert expected.clip_grad_norm_(0.1) > 0.2
    check_equal(read(stats, FEW), read(expected, FEW))
    model[0].weight.grad.mul_(2)
    with pytest.raises(LifetimeError, match=r"'0.weight'.*changed"):
        stats.variance["0.weight"]


@pytest.mark.parametrize("follow", [False, True])
def test_clipping(two, follow):
    """The check of p.grad is as strict as in one process: what DDP makes of it is known, and nothing else."""
    two(clipped, follow)


def in_turns():
    model, x, y = problem()
    ddp = ddp_of(model)
    stats = gradstats.attach(ddp, *FEW, every=2)
    alone, *_ = problem()
    expected = gradstats.attach(alone, *FEW, every=2)
    optimizers = ours(model), ours(alone)
    for step in range(5):
        rows = torch.arange(8 * step, 8 * step + 8)
        for forward, optimizer, part in ((ddp, optimizers[0], share), (alone, optimizers[1], lambda rows: rows)):
            forward.zero_grad()
            loss_of(forward(part(x[rows])), part(y[rows])).backward()
            optimizer.step()
        assert stats.gathered == expected.gathered == (step % 2 == 0)
        assert stats.batch_size == 8
        if stats.gathered:
            check_equal(read(stats, FEW), read(expected, FEW))
    assert (vector(model) - vector(alone)).norm() <= 1e-9 * vector(alone).norm()


def test_every_second_window(two):
    two(in_turns)


def sampled():
    """Half of the examples of each rank, not the same places on both."""
    model, x, y = problem()
    ddp = ddp_of(model)
    stats = gradstats.attach(ddp, "second_moment", fraction=0.5)
    drawn = []
    original = stats.sampling.draw
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(stats.sampling), "draw", lambda self, n: drawn.append(original(n)) or drawn[-1])
        loss_of(ddp(share(x[:64])), share(y[:64])).backward()
    places = [torch.zeros_like(drawn[0]) for _ in range(2)]
    dist.all_gather(places, drawn[0])
    assert not torch.equal(*places)
    seen = torch.cat([places[0], 32 + places[1]])
    alone, *_ = problem()
    expected = gradstats.attach(alone, "second_moment")
    loss_of(alone(x[seen]), y[seen]).backward()
    assert (stats.batch_size, len(seen)) == (64, 32)
    for name, q in expected.second_moment.items():
        torch.testing.assert_close(stats.second_moment[name], q)


def test_part_of_the_examples(two):
    two(sampled)


def pairs():
    model, x, _ = problem()
    ddp = ddp_of(model)
    gradstats.attach(ddp, "gram")
    with pytest.raises(GradstatsError, match=r"'gram' pairs the examples of all 2 ranks.*'projection'"):
        ddp(share(x[:8]))


def test_pairs_of_examples_are_refused(two):
    two(pairs)


def of_opacus():
    model, x, _ = problem()
    ddp = ddp_of(model)
    gradstats.attach(ddp, engine="opacus")
    with pytest.raises(CoverageError, match=r"engine='fused'"):
        ddp(share(x[:8]))


def test_opacus_is_refused(two):
    pytest.importorskip("opacus")
    two(of_opacus)


# The rank as micro-batch


def rank_as_microbatch(granularity, passes, hook, each=False, views=False):
    """The gradients of ranks are those of micro-batches of one process, whatever their order."""
    model, x, y = problem()
    alone, *_ = problem()
    options = {"granularity": granularity} | ({"microbatch_size": 4} if granularity == "microbatch" else {})
    menu = ("second_moment", "variance", "noise_scale") + (("norms", "max_abs") if granularity == "microbatch" else ())
    ddp = ddp_of(model, gradient_as_bucket_view=views)
    if hook:
        ddp.register_comm_hook(None, allreduce_hook)
    stats, expected = (gradstats.attach(m, *menu, engine="microbatch", **options) for m in (ddp, alone))
    for _ in range(2):
        ddp.zero_grad(set_to_none=not views)
        alone.zero_grad()
        for i in range(passes):
            rows = torch.arange(8 * i, 8 * i + 8)
            with nullcontext() if each or i + 1 == passes else ddp.no_sync():
                (loss_of(ddp(share(x[rows])), share(y[rows])) / passes).backward()
        for rank in range(2):
            for i in range(passes):
                rows = torch.arange(8 * i + 4 * rank, 8 * i + 4 * rank + 4)
                (loss_of(alone(x[rows]), y[rows]) / (2 * passes)).backward()
        assert stats.batch_size == 8 * passes
        check_equal(read(stats, menu), read(expected, menu))


@pytest.mark.parametrize("granularity", ["example", "microbatch"])
@pytest.mark.parametrize(("passes", "hook"), [(1, False), (2, False), (1, True)])
def test_the_rank_as_micro_batch(two, granularity, passes, hook):
    two(rank_as_microbatch, granularity, passes, hook)


def test_micro_batches_are_counted_once(two):
    two(rank_as_microbatch, "example", 3, False, True)


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("hook", [False, True])
def test_micro_batches_in_views_of_a_bucket(two, hook, each):
    two(rank_as_microbatch, "example", 3, hook, each, True)


def unshared():
    model, x, y = problem()
    ddp = ddp_of(model)
    stats = gradstats.attach(ddp, engine="microbatch")
    loss_of(ddp(share(x[:8])), share(y[:8])).backward()
    with ddp.no_sync():
        loss_of(ddp(share(x[:8])), share(y[:8])).backward()
    with pytest.raises(LifetimeError, match="average of 2 ranks and.*no_sync"):
        stats.second_moment["0.weight"]


def test_a_micro_batch_that_was_not_averaged(two):
    two(unshared)


def dropped(engine):
    """A backward pass under no_sync whose gradient is zeroed before it was averaged."""
    model, x, y = problem()
    ddp = ddp_of(model)
    stats = gradstats.attach(ddp, *FEW[:2], engine=engine)
    alone, *_ = problem()
    expected = gradstats.attach(alone, *FEW[:2], engine=engine)
    with ddp.no_sync():
        loss_of(ddp(share(x[8:16])), share(y[8:16])).backward()
    ddp.zero_grad()
    loss_of(ddp(share(x[:8])), share(y[:8])).backward()
    for rows in (range(4), range(4, 8)) if engine == "microbatch" else (range(8),):
        (loss_of(alone(x[list(rows)]), y[list(rows)]) * len(rows) / 8).backward()
    check_equal(read(stats, FEW[:2]), read(expected, FEW[:2]))


@pytest.mark.parametrize("engine", ["fused", "microbatch"])
def test_what_was_zeroed_is_not_sent(two, engine):
    two(dropped, engine)


def unequal_microbatches():
    model, x, y = problem()
    ddp = ddp_of(model)
    stats = gradstats.attach(ddp, engine="microbatch")
    with pytest.warns(UserWarning, match="5, 3 examples"):
        loss_of(ddp(share(x[:8], (5, 3))), share(y[:8], (5, 3))).backward()
    with pytest.raises(LifetimeError, match=r"over (5, 3|3, 5) examples.*unequal micro-batches"):
        stats.second_moment["0.weight"]


def test_unequal_ranks_are_no_micro_batches(two):
    two(unequal_microbatches)


def computed():
    model, x, y = problem()
    alone, *_ = problem()
    ddp = ddp_of(model)
    result = gradstats.compute(ddp, loss_of, share(x[:8]), share(y[:8]), FEW)
    expected = gradstats.compute(alone, loss_of, x[:8], y[:8], FEW)
    for name in ("second_moment", "variance", "norms"):
        assert result[name].keys() == expected[name].keys()
        for parameter, value in expected[name].items():
            torch.testing.assert_close(result[name][parameter], value)
    torch.testing.assert_close(result.gradients, expected.gradients)
    with pytest.raises(GradstatsError, match="module inside of DDP"):
        gradstats.verify(ddp, loss_of, x[:8], y[:8])


def test_compute_is_that_of_all_examples(two):
    two(computed)


def one_by_one():
    model, x, y = problem()
    ddp, (x, y) = ddp_of(model), (share(x[:8]), share(y[:8]))
    found = gradstats.per_example_gradients(ddp, loss_of, x, y)
    with gradstats.attach(ddp) as stats:
        assert list(found) == list(stats.parameters())
    alone, *_ = problem()
    torch.testing.assert_close(found, gradstats.per_example_gradients(alone, loss_of, x, y))


def test_per_example_gradients_are_those_of_this_rank_by_the_names_of_statistics(two):
    two(one_by_one)


def random_signs():
    """With all probes, exact on every rank."""
    model, x, y = problem()
    ddp = ddp_of(model)
    stats = gradstats.attach(ddp, "second_moment", "variance", engine="random_sign", probes=3)
    stats.backward(torch.nn.functional.cross_entropy(ddp(share(x[:8])), share(y[:8]), reduction="none"))
    expected = of_one_process("mlp")
    found = read(stats, ("second_moment", "variance"))
    check_equal(found, {key: expected[key] for key in found})


def test_random_signs(two):
    two(random_signs)
