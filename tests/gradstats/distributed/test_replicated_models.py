"""Models that ranks use unequally, in several dtypes, recomputed, compiled, in parts."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import gradstats
from gradstats.errors import LifetimeError
from tests.gradstats.distributed.replicas import (
    FEW,
    check_equal,
    ddp_of,
    loss_of,
    of_one_process,
    ours,
    problem,
    rank_of,
    read,
    share,
    vector,
)


class Branches(nn.Module):
    """Uses a layer on some ranks, another on none, and one weight twice."""

    def __init__(self):
        super().__init__()
        self.first, self.some, self.none = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.last = nn.Linear(6, 3)

    def forward(self, x, branch):
        h = self.first(self.first(x).tanh())
        return self.last(self.some(h).tanh() if branch else h)


def unused():
    torch.manual_seed(0)
    _, x, y = problem()
    model = Branches().double()
    alone = copy.deepcopy(model)
    ddp = ddp_of(model, find_unused_parameters=True)
    stats, expected = gradstats.attach(ddp, *FEW), gradstats.attach(alone, *FEW)
    for step in range(3):
        taken = [rank == step % 2 for rank in range(2)]
        ddp.zero_grad()
        alone.zero_grad()
        loss_of(ddp(share(x[:8]), taken[rank_of()[0]]), share(y[:8])).backward()
        for rank in range(2):  # as different calls, so that one process counts the examples of both at every layer
            (loss_of(alone(x[4 * rank : 4 * rank + 4], taken[rank]), y[4 * rank : 4 * rank + 4]) / 2).backward()
        assert stats.batch_size == expected.batch_size == 8
        used = [name for name in stats.parameters() if not name.startswith("none")]
        assert [name for name in stats.parameters() if stats.has(name)] == used
        for name in FEW[:3]:
            found, one = stats.read(name), expected.read(name)
            check_equal({(name, k): found[k] for k in used}, {(name, k): one[k] for k in used})


def test_parameters_that_a_rank_does_not_use(two):
    two(unused)


def moved():
    """Rank 0 has not used a layer before its optimizer moves it."""
    _, x, y = problem()
    model = Branches().double()
    alone = copy.deepcopy(model)
    ddp = ddp_of(model, find_unused_parameters=True)
    for m in (ddp, alone):
        gradstats.attach(m)
    optimizers = ours(model), ours(alone)
    for taken in ([False, True], [False, True], [True, False]):
        loss_of(ddp(share(x[:8]), taken[rank_of()[0]]), share(y[:8])).backward()
        for rank in range(2):
            rows = slice(4 * rank, 4 * rank + 4)
            (loss_of(alone(x[rows], taken[rank]), y[rows]) / 2).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert (vector(model) - vector(alone)).norm() <= 1e-9 * vector(alone).norm()


def test_an_optimizer_moves_what_its_rank_has_not_used(two):
    two(moved)


def begun_anew(engine, follow=False):
    """A layer's gradient is zeroed, others are kept, and the next backward pass reaches it on rank 0 alone; or all are
    zeroed, and the scale of the loss is another one."""
    _, x, y = problem()
    model = Branches().double()
    alone = copy.deepcopy(model)
    ddp = ddp_of(model, find_unused_parameters=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, enabled=follow)
    stats = gradstats.attach(ddp, "second_moment", engine=engine, grad_scaler=scaler if follow else None)
    expected = gradstats.attach(alone, "second_moment", engine=engine)
    for step in range(2):
        taken = [True, step == 0]
        rows = torch.arange(8 * step, 8 * step + 8)
        scaler.scale(loss_of(ddp(share(x[rows]), taken[rank_of()[0]]), share(y[rows]))).backward()
        for rank in range(2):
            own = rows[4 * rank : 4 * rank + 4]
            (loss_of(alone(x[own], taken[rank]), y[own]) / 2).backward()
        if step == 0:
            for m in (model, alone):
                (m if follow else m.some).zero_grad()
            if follow:
                scaler.update(2.0)
    for name in ("first.weight", "some.weight", "some.bias", "last.weight"):
        check_equal({("", name): stats.second_moment[name]}, {("", name): expected.second_moment[name]})


@pytest.mark.parametrize("engine", ["fused", "microbatch"])
def test_gradients_zeroed_in_part_begin_a_window_on_all_ranks(two, engine):
    two(begun_anew, engine)


@pytest.mark.parametrize("engine", ["fused", "microbatch"])
def test_the_scale_of_a_loss_is_known_to_ranks_that_do_not_use_a_layer(two, engine):
    two(begun_anew, engine, True)


def kept(change, engine):
    """Gradients are kept, and the next backward pass reaches a layer on rank 0 alone."""
    _, x, y = problem()
    model = Branches().double()
    alone = copy.deepcopy(model)
    ddp = ddp_of(model, find_unused_parameters=True, gradient_as_bucket_view=engine == "fused")
    stats, expected = (gradstats.attach(m, "second_moment", engine=engine) for m in (ddp, alone))
    for step in range(2):
        taken = [True, step == 0]
        rows = torch.arange(8 * step, 8 * step + 8)
        loss_of(ddp(share(x[rows]), taken[rank_of()[0]]), share(y[rows])).backward()
        for rank in range(2):
            own = rows[4 * rank : 4 * rank + 4]
            (loss_of(alone(x[own], taken[rank]), y[own]) / 2).backward()
        if change and step == 0:
            model.some.weight.grad.mul_(0.5)
    if change:
        with pytest.raises(LifetimeError, match=r"'some.weight' holds more"):
            stats.second_moment["some.weight"]
    else:
        used = ("first.weight", "some.weight", "some.bias", "last.weight", "last.bias")
        check_equal(*({("", name): found.second_moment[name] for name in used} for found in (stats, expected)))


@pytest.mark.parametrize("engine", ["fused", "microbatch"])
@pytest.mark.parametrize("change", [False, True])
def test_gradients_that_are_kept_are_known_on_all_ranks(two, change, engine):
    two(kept, change, engine)


def narrow():
    """Gradients in bfloat16, sums in float32: these follow, in one all-reduce."""
    model, x, y = problem("mlp", torch.bfloat16)
    alone = copy.deepcopy(model)
    ddp = ddp_of(model)
    stats, expected = gradstats.attach(ddp, "second_moment"), gradstats.attach(alone, "second_moment")
    loss_of(ddp(share(x[:8])), share(y[:8])).backward()
    for rank in range(2):  # rounded as on the ranks
        (loss_of(alone(x[4 * rank : 4 * rank + 4]), y[4 * rank : 4 * rank + 4]) / 2).backward()
    assert stats.second_moment["0.weight"].dtype == torch.float32 and stats.batch_size == 8
    check_equal(read(stats, ["second_moment"]), read(expected, ["second_moment"]), 1e-6)


def test_bfloat16(two):
    two(narrow)


def mixed():
    """One bucket for each dtype."""
    torch.manual_seed(0)
    _, x, y = problem()
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), Doubled(), nn.Linear(5, 3).double())
    alone = copy.deepcopy(model)
    ddp = ddp_of(model)
    stats, expected = gradstats.attach(ddp, *FEW), gradstats.attach(alone, *FEW)
    x = x.float()
    loss_of(ddp(share(x[:8])), share(y[:8])).backward()
    loss_of(alone(x[:8]), y[:8]).backward()
    assert stats.second_moment["0.weight"].dtype == torch.float32
    assert stats.second_moment["3.weight"].dtype == torch.float64
    check_equal(read(stats, FEW), read(expected, FEW), 1e-4)


class Doubled(nn.Module):
    def forward(self, x):
        return x.double()


def test_mixed_dtypes(two):
    two(mixed)


def two_models_in_one():
    model, x, y = problem()
    alone = copy.deepcopy(model)
    ddp = ddp_of(model)
    parts = [gradstats.attach(model[0], *FEW), gradstats.attach(model[3], *FEW)]
    expected = [gradstats.attach(alone[0], *FEW), gradstats.attach(alone[3], *FEW)]
    loss_of(ddp(share(x[:8])), share(y[:8])).backward()
    loss_of(alone(x[:8]), y[:8]).backward()
    for found, one in zip(parts, expected, strict=True):
        check_equal(read(found, FEW), read(one, FEW))
    parts[0].detach()
    ddp.zero_grad()
    loss_of(ddp(share(x[:8])), share(y[:8])).backward()
    check_equal(read(parts[1], FEW), read(expected[1], FEW))
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_several_models_in_one(two):
    two(two_models_in_one)


def left_to_the_rank():
    """Parameters that DDP was told to ignore have this rank's gradient, and this rank's statistics."""
    model, x, y = problem()
    alone, *_ = problem()
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["3.weight"])
    ddp = ddp_of(model)
    stats, own = gradstats.attach(ddp, *FEW), gradstats.attach(alone, *FEW)
    loss_of(ddp(share(x[:8])), share(y[:8])).backward()
    loss_of(alone(share(x[:8])), share(y[:8])).backward()
    found, alone, of_all = read(stats, FEW[:3]), read(own, FEW[:3]), of_one_process("mlp")
    expected = {key: (alone if key[1] == "3.weight" else of_all)[key] for key in found if key[1]}
    check_equal({key: found[key] for key in expected}, expected)


def test_parameters_that_are_not_averaged(two):
    two(left_to_the_rank)


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.reentrant = reentrant

    def forward(self, x):
        h = self.first(x).tanh()
        return self.last(checkpoint(lambda h: self.middle(h).tanh(), h, use_reentrant=self.reentrant))


def checkpointed(reentrant, static, engine):
    torch.manual_seed(0)
    _, x, y = problem()
    model = Checkpointed(reentrant).double()
    alone = copy.deepcopy(model)
    ddp = ddp_of(model, static_graph=static)
    stats, expected = (gradstats.attach(m, *FEW[:2], engine=engine) for m in (ddp, alone))
    for _ in range(3):
        ddp.zero_grad()
        loss_of(ddp(share(x[:8])), share(y[:8])).backward()
    for rows in (range(4), range(4, 8)) if engine == "microbatch" else (range(8),):
        (loss_of(alone(x[list(rows)]), y[list(rows)]) * len(rows) / 8).backward()
    check_equal(read(stats, FEW[:2]), read(expected, FEW[:2]))


@pytest.mark.parametrize("engine", ["fused", "microbatch"])
@pytest.mark.parametrize(("reentrant", "static"), [(False, False), (True, False), (True, True)])
def test_checkpoints(two, reentrant, static, engine):
    two(checkpointed, reentrant, static, engine)


def sparse():
    """An embedding with sparse gradients has no statistics, but a bucket of its own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 4, sparse=True), nn.Flatten(), nn.Linear(20, 3)).double()
    alone = copy.deepcopy(model)
    x, y = torch.randint(0, 11, (8, 5)), torch.randint(0, 3, (8,))
    ddp = ddp_of(model)
    stats, expected = (gradstats.attach(m, *FEW, ignore=["0"]) for m in (ddp, alone))
    loss_of(ddp(share(x)), share(y)).backward()
    loss_of(alone(x), y).backward()
    check_equal(read(stats, FEW), read(expected, FEW))
    torch.testing.assert_close(model[0].weight.grad.to_dense(), alone[0].weight.grad.to_dense())


def test_sparse_gradients(two):
    two(sparse)


def absent():
    """One of the attached parts of a model is not used at all by a rank."""
    torch.manual_seed(0)
    _, x, y = problem()
    model = Branches().double()
    ddp = ddp_of(model, find_unused_parameters=True)
    handles = [gradstats.attach(part) for part in (model.last, model.some)]
    assert len(handles) == 2
    with pytest.raises(LifetimeError, match=r"rank 1 went through no layer of the attached Linear.*whole model"):
        loss_of(ddp(share(x[:8]), rank_of()[0] == 0), share(y[:8])).backward()


def test_a_part_that_a_rank_does_not_use_is_refused(two):
    two(absent)


def compiled(outside):
    warnings.simplefilter("ignore")  # torch's own, of its compiler
    model, x, y = problem()
    alone = of_one_process("mlp")
    stats = gradstats.attach(model, *FEW)
    stats.probe(x[:8])
    if outside:
        run = torch.compile(DistributedDataParallel(model), backend="aot_eager")
    else:
        run = DistributedDataParallel(torch.compile(model, backend="aot_eager"))
    for _ in range(2):
        model.zero_grad()
        loss_of(run(share(x[:8])), share(y[:8])).backward()
        found = read(stats, FEW)
        check_equal(found, {key: alone[key] for key in found})


@pytest.mark.slow
@pytest.mark.parametrize("outside", [False, True])
def test_compiled(two, outside):
    two(compiled, outside)
