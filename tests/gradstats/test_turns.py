"""Statistics of every k-th window."""

import copy
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from gradstats import MissingStatistic, attach
from gradstats.rules import fallback
from tests import compiling, oracle

B = 6


def network():
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def batch(n=B):
    return torch.randn(n, 5).double(), torch.randint(0, 3, (n,))


def step(model, x, y):
    F.cross_entropy(model(x), y).backward()


def zero_first(model, optimizer, x, y):
    model.zero_grad()
    step(model, x, y)
    optimizer.step()


def zero_between(model, optimizer, x, y):
    loss = F.cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def zero_last(model, optimizer, x, y):
    step(model, x, y)
    optimizer.step()
    model.zero_grad()


def zero_in_place(model, optimizer, x, y):
    optimizer.zero_grad(set_to_none=False)
    step(model, x, y)
    optimizer.step()


def without_optimizer(model, optimizer, x, y):
    step(model, x, y)
    model.zero_grad()


def evaluation_between(model, optimizer, x, y):
    step(model, x, y)
    model(x)
    optimizer.step()
    model.zero_grad()
    model(x)


@pytest.mark.parametrize(
    "loop", [zero_first, zero_between, zero_last, zero_in_place, without_optimizer, evaluation_between]
)
def test_every_kth_window_is_gathered(loop):
    model, (x, y) = network(), batch()
    stats = attach(model, *oracle.STATISTICS, every=3)
    assert not stats.gathered
    optimizer, found = torch.optim.SGD(model.parameters(), lr=0.1), []
    for _ in range(8):
        loop(model, optimizer, x, y)
        found.append(stats.gathered)
        assert stats.batch_size == B
    assert found == [True, False, False, True, False, False, True, False]


def test_gathered_windows_are_exact_and_others_are_plain():
    model, optimizers = network(), []
    twin = copy.deepcopy(model)
    stats = attach(model, *oracle.STATISTICS, every=2)
    for m in (model, twin):
        optimizers.append(torch.optim.SGD(m.parameters(), lr=0.1))
    for i in range(4):
        x, y = batch(B + i)
        before = copy.deepcopy(twin)
        model.load_state_dict(twin.state_dict())  # gradients are summed in another order where they are gathered
        for m, optimizer in zip((model, twin), optimizers, strict=True):
            optimizer.zero_grad()
            step(m, x, y)
        assert stats.batch_size == B + i
        if i % 2 == 0:
            assert oracle.exact(stats, oracle.contributions(before, F.cross_entropy, x, y))
        else:
            for p, q in zip(model.parameters(), twin.parameters(), strict=True):
                assert torch.equal(p.grad, q.grad)
            for entries in (stats.second_moment, stats.norms, stats.variance):
                with pytest.raises(MissingStatistic, match=r"one window in 2 \(every=2\). Ask stats.gathered"):
                    entries["0.weight"]
            with pytest.raises(MissingStatistic, match="stats.gathered"):
                stats.norms.total  # noqa: B018
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("zero", ["first", "between"])
def test_all_steps_of_a_window_are_alike(zero):
    model = network()
    stats = attach(model, *oracle.STATISTICS, every=2)
    optimizer, found = torch.optim.SGD(model.parameters(), lr=0.0), []
    for _ in range(5):
        x, y = batch()
        for i, rows in enumerate((slice(0, 1), slice(1, 3), slice(3, B))):
            if i == 0 and zero == "first":
                optimizer.zero_grad()
            loss = F.cross_entropy(model(x[rows]), y[rows]) * len(y[rows]) / B
            if i == 0:
                optimizer.zero_grad()
            loss.backward()
        assert stats.batch_size == B
        found.append(stats.gathered)
        if stats.gathered:
            assert oracle.exact(stats, oracle.contributions(network_of(model), F.cross_entropy, x, y))
        optimizer.step()
    assert found == [True, False, True, False, True]


def network_of(model):
    """A plain copy of an attached network."""
    plain = network()
    plain.load_state_dict(model.state_dict())
    return plain


def test_a_window_of_both_kinds_is_not_gathered():
    """The parameters are moved by hand between two windows, so that nothing tells the forward that one has ended."""
    model, (x, y) = network(), batch()
    stats = attach(model, every=2)
    step(model, x, y)
    model.zero_grad()
    step(model, x, y)  # the second window: plain
    loss = F.cross_entropy(model(x), y)  # which seems to go on
    model.zero_grad()
    loss.backward()
    assert not stats.gathered and stats.batch_size == B
    step(model, x, y)
    assert not stats.gathered and stats.batch_size == 2 * B


def test_ends_of_windows_that_nothing_tells_of_leave_no_model_without_statistics():
    model, (x, y) = network(), batch()
    stats = attach(model, every=3)
    found = []
    for _ in range(2):  # the second window is plain
        step(model, x, y)
        model.zero_grad()
    for _ in range(12):
        loss = F.cross_entropy(model(x), y)
        model.zero_grad()
        loss.backward()
        found.append(stats.gathered)
    assert any(found[-3:])


def test_gradients_of_some_parameters_are_kept():
    """A window is that of the parameters whose gradients are zeroed."""
    model, (x, y) = network(), batch()
    stats = attach(model, every=2)
    optimizer, found = torch.optim.SGD(model[0].parameters(), lr=0.1), []
    for _ in range(4):
        optimizer.zero_grad()
        step(model, x, y)
        optimizer.step()
        found.append(stats.accounts["0.weight"].gathered)
        assert not found[-1] or stats.second_moment["0.weight"].shape == (7, 5)
    assert found == [True, False, True, False]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_recomputation_decides_as_its_forward_did(reentrant, whole):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = network(), nn.Linear(3, 3).double()

        def forward(self, x):
            h = checkpoint(self.body, x, use_reentrant=reentrant)
            return checkpoint(self.head, h, use_reentrant=reentrant) if whole else self.head(h)

    model, (x, y) = Checkpointed(), batch()
    x.requires_grad_()  # reentrant checkpointing asks for it
    plain = copy.deepcopy(model)
    stats, found = attach(model, *oracle.STATISTICS, every=2), []
    for _ in range(4):
        loss = F.cross_entropy(model(x), y)
        model.zero_grad()
        loss.backward()
        torch.optim.SGD(model.parameters(), lr=0.0).step()
        found.append(stats.gathered)
        assert stats.batch_size == B
        assert not found[-1] or oracle.exact(stats, oracle.contributions(plain, F.cross_entropy, x, y))
    assert found == [True, False, True, False]


@pytest.mark.parametrize("reentrant", [False, True])
def test_steps_within_the_backward_pass(reentrant):
    """The optimizer steps as soon as a gradient is there, before earlier parts of the forward are recomputed."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(5, 5).double(), nn.Linear(5, 3).double()

        def forward(self, x):
            h = checkpoint(self.first, x, use_reentrant=reentrant)
            return checkpoint(self.second, h.tanh(), use_reentrant=reentrant)

    model, (x, y), found = Two(), batch(), []
    x.requires_grad_()
    stats = attach(model, every=2)
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}

    def take(p):
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(take)
    for _ in range(4):
        step(model, x, y)
        found.append(stats.gathered)
        assert stats.batch_size == B
    assert found == [True, False, True, False]


def test_a_plain_window_does_no_work_of_ours(monkeypatch):
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(5).double())

        def forward(self, x):
            return x * self.scale

    model, (x, y) = nn.Sequential(Bare(), network()), batch()
    stats = attach(model, every=2)
    step(model, x, y)
    model.zero_grad()

    def never(*args):
        raise AssertionError("the vmap leaf ran")

    monkeypatch.setattr(fallback, "run", never)
    output = model(x)
    assert type(output.grad_fn).__name__ == "AddmmBackward0"
    F.cross_entropy(output, y).backward()
    assert not stats.gathered
    assert all(s.grad is None for account in stats.accounts.values() for s in account.shadows.values())


def test_autograd_grad_leaves_no_trace_in_a_plain_window():
    model, (x, y) = network(), batch()
    stats = attach(model, every=2)
    step(model, x, y)
    model.zero_grad()
    torch.autograd.grad(F.cross_entropy(model(x[:2]), y[:2]), list(model.parameters()))
    assert stats.gathered and stats.batch_size == B
    step(model, x, y)
    assert not stats.gathered and stats.batch_size == B


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_begins_with_a_gathered_window(copied):
    model, (x, y) = network(), batch()
    stats = attach(model, every=2, fraction=0.5)
    zero_last(model, torch.optim.SGD(model.parameters(), lr=0.1), x, y)
    other = copied(model)
    step(other, x, y)
    handle = other[0].__dict__["_gradstats_leaf"].handle
    assert handle.gathered and handle.sampling.every == 2 and handle.sampling.fraction == 0.5
    step(model, x, y)
    assert not stats.gathered


def test_clipping_in_a_plain_window():
    model, (x, y) = network(), batch()
    stats = attach(model, "variance", every=2, follow_clipping=True)
    for i in range(4):
        model.zero_grad()
        step(model, x, y)
        stats.clip_grad_norm_(1e-3)
        assert stats.gathered == (i % 2 == 0)
        norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
        torch.testing.assert_close(norm, torch.tensor(1e-3).double(), rtol=1e-2, atol=0)


def test_zero_begins_with_a_gathered_window():
    model, (x, y) = network(), batch()
    stats = attach(model, every=3)
    zero_last(model, torch.optim.SGD(model.parameters(), lr=0.1), x, y)
    stats.zero()
    assert not stats.gathered
    step(model, x, y)
    assert stats.gathered


def test_both_together():
    model, optimizer, found = network(), None, []
    stats = attach(model, every=2, fraction=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(4):
        zero_first(model, optimizer, *batch())
        found.append(stats.gathered)
    assert found == [True, False, True, False]


def test_memory_of_sums_is_kept_for_the_next_window_that_is_gathered():
    """Through those that are not, since the system gives it again page by page; it is gone before new sums are."""
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    stats, x = attach(model, "second_moment", every=3), torch.randn(4, 6)
    sums = []
    for _ in range(5):
        model.zero_grad()
        model(x).sum().backward()
        if stats.gathered:
            sums.append(weakref.ref(stats.window("0.weight", ["sum_of_squares"]).sums["sum_of_squares"]))
        assert sums[-1]() is not None
    assert len(sums) == 2 and sums[0]() is None


# Under torch.compile


def compiled(model, x, **options):
    """A compiled model, its handle, and the backend, which counts."""
    stats, backend = attach(model, *oracle.STATISTICS, **options), compiling.Counting()
    stats.probe(x)
    return torch.compile(model, fullgraph=True, backend=backend), stats, backend


@compiling.marked
@pytest.mark.parametrize("loop", [zero_first, zero_between, zero_last])
def test_two_graphs_are_compiled(loop):
    model, (x, y) = network(), batch()
    twin = copy.deepcopy(model)
    call, stats, backend = compiled(model, x, every=3)
    optimizers, found = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, twin)], []
    for _ in range(7):
        before = copy.deepcopy(twin)
        loop(call, optimizers[0], x, y)
        loop(twin, optimizers[1], x, y)
        found.append(stats.gathered)
        assert stats.batch_size == B
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q)
        if stats.gathered:
            c = oracle.contributions(before, F.cross_entropy, x, y)
            torch.testing.assert_close(stats.second_moment["0.weight"], oracle.second_moment(c["0.weight"]))
            torch.testing.assert_close(stats.norms["2.bias"], oracle.norms(c["2.bias"]))
        else:
            with pytest.raises(MissingStatistic, match="stats.gathered"):
                stats.second_moment["0.weight"]
    assert found == [True, False, False, True, False, False, True]
    assert backend.graphs == 2


@compiling.marked
def test_accumulation_when_compiled():
    model, found = network(), []
    call, stats, backend = compiled(model, batch(2)[0], every=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        for _ in range(3):
            step(call, *batch(2))
        assert stats.batch_size == 6
        found.append(stats.gathered)
        optimizer.step()
    assert found == [True, False, True, False] and backend.graphs == 2
