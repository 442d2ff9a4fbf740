"""Lifetime: what counts as a new window, what adds up, and what is refused."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradstats
from gradstats import CoverageError, GradstatsError, LifetimeError, MissingStatistic, attach, function
from tests import oracle

B = 6


def loss_of(output, y):
    return F.cross_entropy(output, y)


@pytest.fixture
def setting():
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    x, y = torch.randn(B, 5).double(), torch.randint(0, 3, (B,))
    expected = oracle.contributions(model, loss_of, x, y)
    return model, x, y, expected, attach(model, *oracle.STATISTICS)


def step(model, x, y):
    loss_of(model(x), y).backward()


@pytest.mark.parametrize(
    "zero",
    [
        lambda m: m.zero_grad(),
        lambda m: m.zero_grad(set_to_none=False),
        lambda m: torch.optim.SGD(m.parameters()).zero_grad(),
    ],
)
def test_zeroed_gradients_start_afresh(setting, zero):
    model, x, y, expected, handle = setting
    for _ in range(3):
        step(model, -x, y)
        zero(model)
        step(model, x, y)
        assert handle.batch_size == B and oracle.exact(handle, expected)
        zero(model)


def test_zeroing_between_forward_and_backward(setting):
    model, x, y, expected, handle = setting
    step(model, -x, y)
    loss = loss_of(model(x), y)
    model.zero_grad()
    loss.backward()
    assert handle.batch_size == B and oracle.exact(handle, expected)


@pytest.mark.parametrize("sizes", [(3, 3), (1, 5), (2, 3, 1)])
def test_accumulation_adds_up(setting, sizes):
    model, x, y, expected, handle = setting
    start = 0
    for size in sizes:
        rows = slice(start, start + size)
        (loss_of(model(x[rows]), y[rows]) * size / B).backward()
        start += size
    assert handle.batch_size == B and oracle.exact(handle, expected)


def test_statistics_are_read_until_the_next_backward(setting):
    model, x, y, expected, handle = setting
    step(model, x, y)
    model.zero_grad()
    model(x)
    c = expected["0.weight"]
    torch.testing.assert_close(handle.second_moment["0.weight"], oracle.second_moment(c))
    torch.testing.assert_close(handle.norms["0.weight"], oracle.norms(c))
    with pytest.raises(GradstatsError, match="before zero_grad"):
        handle.variance["0.weight"]


def test_total_norm_and_keys(setting):
    model, x, y, expected, handle = setting
    step(model, x, y)
    flat = torch.cat([c.flatten(1) for c in expected.values()], 1)
    torch.testing.assert_close(handle.norms.total, oracle.norms(flat))
    assert list(handle.second_moment) == [name for name, _ in model.named_parameters()]
    torch.testing.assert_close(handle.second_moment[model[0].bias], handle.second_moment["0.bias"])
    with pytest.raises(MissingStatistic, match="no parameter 'nothing'"):
        handle.second_moment["nothing"]
    with pytest.raises(MissingStatistic, match="does not belong"):
        handle.second_moment[nn.Parameter(torch.zeros(2))]


def test_sum_loss():
    model, x, y = nn.Linear(4, 3).double(), torch.randn(B, 4).double(), torch.randint(0, 3, (B,))
    c = oracle.contributions(model, lambda o, y: F.cross_entropy(o, y, reduction="sum"), x, y)["weight"]
    handle = attach(model, *oracle.STATISTICS, loss_reduction="sum")
    F.cross_entropy(model(x), y, reduction="sum").backward()
    torch.testing.assert_close(handle.second_moment["weight"], c.square().mean(0))
    torch.testing.assert_close(handle.variance["weight"], c.var(0))
    torch.testing.assert_close(handle.norms["weight"], c.flatten(1).norm(dim=1))


def test_duplicating_every_example_leaves_the_second_moment(setting):
    model, x, y, _, handle = setting
    step(model, x, y)
    once = {name: q.clone() for name, q in handle.second_moment.items()}
    model.zero_grad()
    step(model, x.repeat(3, 1), y.repeat(3))
    for name, q in handle.second_moment.items():
        torch.testing.assert_close(q, once[name])


@pytest.mark.parametrize(
    "mode", ["unused output", "no_grad", "inference_mode", "evaluation with gradients", "autograd.grad"]
)
def test_what_is_not_backpropagated_leaves_no_trace(setting, mode):
    model, x, y, expected, handle = setting
    loss = loss_of(model(x), y)
    other = torch.randn(9, 5).double()
    if mode == "unused output":
        model(other)
    elif mode == "no_grad":
        with torch.no_grad():
            model(other)
    elif mode == "inference_mode":
        with torch.inference_mode():
            model(other)
    elif mode == "evaluation with gradients":
        model.eval()
        model(other)
        model.train()
    else:
        torch.autograd.grad(model(other).sum(), list(model.parameters()))
    loss.backward()
    assert handle.batch_size == B and oracle.exact(handle, expected)


def test_exception_between_forward_and_backward(setting):
    model, x, y, expected, handle = setting

    class Breaks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, d):
            raise ValueError("planted")

    h = model[1](model[0](x))
    with pytest.raises(ValueError, match="planted"):
        loss_of(model[2](Breaks.apply(h)), y).backward()
    model.zero_grad()
    step(model, x, y)
    assert handle.batch_size == B and oracle.exact(handle, expected)


def cut_short(model, x, y, module):
    """A backward pass whose memory ends where the sums of a module are made."""
    reduce = function.reduce

    def fails(call, contributions):
        if call.leaf.module is module:
            raise torch.OutOfMemoryError("planted")
        return reduce(call, contributions)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(function, "reduce", fails)
        with pytest.raises(torch.OutOfMemoryError, match="planted"):
            step(model, x, y)


@pytest.mark.parametrize("forward", [False, True])
def test_a_pass_that_leaves_no_gradient_does_not_count(setting, forward):
    """As where the head's statistics do not fit, and a step goes on without this batch."""
    model, x, y, expected, handle = setting
    step(model, x, y)
    cut_short(model, -x, y, model[2])
    if forward:
        model(x)
    assert handle.batch_size == B and oracle.exact(handle, expected)


def test_a_second_pass_that_is_refused_changes_nothing(setting):
    model, x, y, expected, handle = setting
    loss = loss_of(model(x), y)
    loss.backward(retain_graph=True)
    with pytest.raises(LifetimeError, match="backpropagated twice"):
        loss.backward()
    assert handle.batch_size == B and oracle.exact(handle, expected)


@pytest.mark.parametrize("forward", [False, True])
def test_a_pass_that_leaves_some_gradients_is_refused(setting, forward):
    model, x, y, expected, handle = setting
    step(model, x, y)
    cut_short(model, -x, y, model[0])
    if forward:
        model(x)
    for name in ("0.weight", "2.weight"):
        with pytest.raises(LifetimeError, match="cut short by an exception"):
            handle.second_moment[name]
    model.zero_grad()
    step(model, x, y)
    assert handle.batch_size == B and oracle.exact(handle, expected)


def refused_siamese(model, x, y):
    (loss_of(model(x), y) + loss_of(model(-x), y)).backward()


def refused_two_in_flight(model, x, y):
    first, second = loss_of(model(x), y), loss_of(model(-x), y)
    first.backward()
    second.backward()


def refused_second_backward(model, x, y):
    loss = loss_of(model(x), y)
    loss.backward(retain_graph=True)
    loss.backward()


def refused_penalty(model, x, y):
    (loss_of(model(x), y) + 0.1 * model[0].weight.square().sum()).backward()


def refused_functional_use(model, x, y):
    loss_of(F.linear(model(x), model[2].weight.T @ model[2].weight.new_ones(3, 3))[:, :3], y).backward()


def refused_flattened_batch(model, x, y):
    model[2](model[0](x.reshape(1, B, 5).repeat(2, 1, 1)).tanh().flatten(0, 1)).sum().backward()


REFUSED = [refused_siamese, refused_two_in_flight, refused_second_backward, refused_penalty, refused_functional_use]


@pytest.mark.parametrize(
    ("use", "way_out"),
    [
        (refused_siamese, "call both from the forward of one module"),
        (refused_two_in_flight, r"stats.new_examples\(\)"),
        (refused_second_backward, "backpropagated twice"),
        (refused_penalty, r"ignore=\['0.weight'\]"),
        (refused_functional_use, "inside of the attached module's forward only"),
        (refused_flattened_batch, "Call the layers from one module's forward"),
    ],
)
def test_refused_and_usable_afterwards(setting, use, way_out):
    model, x, y, expected, handle = setting
    with pytest.raises(GradstatsError, match=way_out):
        use(model, x, y)
    model.zero_grad()
    step(model, x, y)
    assert handle.batch_size == B and oracle.exact(handle, expected)


def test_two_forwards_declared_new_examples(setting):
    model, x, y, expected, handle = setting
    first = loss_of(model(x[:2]), y[:2]) * 2 / B
    handle.new_examples()
    second = loss_of(model(x[2:]), y[2:]) * 4 / B
    (first + second).backward()
    assert handle.batch_size == B and oracle.exact(handle, expected)


@pytest.mark.parametrize("fastest", [False, True])
def test_positions_flattened_into_the_batch(fastest):
    class Flattens(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            x = x.transpose(0, 1) if fastest else x
            y = self.layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])
            return y.transpose(0, 1) if fastest else y

    for n in (1, 3, 4):  # of which one is the number of positions
        x, statistics = torch.randn(n, 3, 4), ("second_moment", "norms")
        gradstats.verify(Flattens(), lambda output, y: output.square().mean(), x, None, statistics)


def test_gradient_changed_after_the_backward_is_refused_where_it_matters(setting):
    model, x, y, _, handle = setting
    step(model, x, y)
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    handle.second_moment["0.weight"]
    with pytest.raises(LifetimeError, match=r"'0.weight' was changed in place"):
        handle.variance["0.weight"]


def test_statistics_not_asked_for_are_missing():
    model = nn.Linear(4, 3)
    handle = attach(model)
    with pytest.raises(MissingStatistic, match="no backward pass"):
        handle.second_moment["weight"]
    model(torch.randn(2, 4)).sum().backward()
    with pytest.raises(MissingStatistic, match="attach\\(model, 'norms'"):
        handle.norms["weight"]


def test_variance_of_one_example_does_not_exist():
    model = nn.Linear(4, 3)
    handle = attach(model, "variance")
    model(torch.randn(1, 4)).sum().backward()
    with pytest.raises(GradstatsError, match="at least two"):
        handle.variance["weight"]


def test_layer_skipped_by_a_micro_batch():
    """A part of the batch does not reach a layer: its contributions there are zero, and B still counts it."""

    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x, both):
            return self.b(self.a(x)) if both else self.a(x)

    for first in (True, False):
        model = Skips().double()
        handle = attach(model, "second_moment", "norms")
        x = torch.randn(5, 4).double()
        for rows, both in ((slice(0, 2), first), (slice(2, 5), not first)):
            model(x[rows], both).square().sum().backward()
        rows = slice(0, 2) if first else slice(2, 5)
        used = handle.norms["b.weight"] > 0
        assert handle.batch_size == 5 and used.tolist() == [r in range(5)[rows] for r in range(5)]
        total = handle.norms["b.weight"].square().mean()
        torch.testing.assert_close(handle.second_moment["b.weight"].sum(), total)


def test_zero_forgets(setting):
    model, x, y, expected, handle = setting
    step(model, x, y)
    handle.zero()
    assert handle.batch_size == 0
    with pytest.raises(MissingStatistic, match="last zeroed"):
        handle.second_moment["0.weight"]
    model.zero_grad()
    step(model, x, y)
    assert oracle.exact(handle, expected)


def test_functional_use_alone_while_accumulating_is_refused(setting):
    """The second micro-batch reaches the weight, but not through its layer."""
    model, x, y, _, handle = setting
    step(model, x, y)
    hidden = model[1](model[0](x))
    with pytest.raises(CoverageError, match=r"'2.(weight|bias)'"):
        (F.linear(hidden, model[2].weight).sum() + model[2].bias.sum()).backward()
    assert handle.batch_size


def test_detach_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.TransformerEncoderLayer(3, 1, 4, batch_first=True))
    before = {name: (type(m), set(m.__dict__), repr(m)) for name, m in model.named_modules()}
    keys = list(model.state_dict())
    with attach(model) as handle:
        assert list(model.state_dict()) == keys
        assert repr(model) == before[""][2]
        model(torch.randn(2, 5, 4)).sum().backward()
        assert handle.batch_size == 2
    assert {name: (type(m), set(m.__dict__), repr(m)) for name, m in model.named_modules()} == before
    assert not model._forward_pre_hooks and not model._forward_hooks
    assert not any(p._backward_hooks for p in model.parameters())
    attach(model).detach()


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, torch.no_grad()(copy.deepcopy), lambda m: pickle.loads(pickle.dumps(m))]
)
def test_copies_have_weights_and_statistics_of_their_own(setting, duplicate):
    model, x, y, _, handle = setting
    step(model, x, y)
    other = duplicate(model)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(0.5)
    bare = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    bare.load_state_dict(other.state_dict())
    expected = oracle.contributions(bare, loss_of, x[:4], y[:4])
    other.zero_grad()
    step(other, x[:4], y[:4])
    assert gradstats.attached(other) is not handle
    assert gradstats.attached(other).batch_size == 4 and oracle.exact(gradstats.attached(other), expected)
    assert handle.batch_size == B


def test_handles_do_not_outlive_the_model():
    model = nn.Linear(4, 3)
    reference = weakref.ref(attach(model))
    model(torch.randn(2, 4)).sum().backward()
    assert reference() is not None
    del model
    gc.collect()
    assert reference() is None


def test_unfreezing_after_attach():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)).double()
    model[0].requires_grad_(False)
    handle = attach(model, *oracle.STATISTICS)
    model(torch.randn(2, 4).double()).sum().backward()
    assert list(handle.second_moment) == ["1.weight", "1.bias"]
    model.zero_grad()
    model[0].requires_grad_(True)
    x, y = torch.randn(3, 4).double(), torch.randint(0, 3, (3,))
    bare = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)).double()
    bare.load_state_dict(model.state_dict())
    expected = oracle.contributions(bare, loss_of, x, y)
    step(model, x, y)
    assert oracle.exact(handle, expected)


def test_set_up_errors():
    with pytest.raises(GradstatsError, match="unknown statistic 'secnd_moment'"):
        attach(nn.Linear(2, 2), "secnd_moment")
    with pytest.raises(GradstatsError, match="unknown engine"):
        attach(nn.Linear(2, 2), engine="magic")
    with pytest.raises(GradstatsError, match="loss_reduction"):
        attach(nn.Linear(2, 2), loss_reduction="none")
    with pytest.raises(CoverageError, match="no trainable parameters"):
        attach(nn.ReLU())
    with pytest.raises(MissingStatistic, match="not attached"):
        gradstats.attached(nn.Linear(2, 2))
    model = nn.Sequential(nn.Linear(2, 2))
    attach(model)
    with pytest.raises(GradstatsError, match="attached already"):
        attach(model)
    patched = nn.Linear(2, 2)
    patched.forward = lambda x: x
    with pytest.raises(CoverageError, match="forward set on the instance"):
        attach(patched)
    assert type(patched) is nn.Linear


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (lambda: nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)), "module '1': .*nn.GroupNorm"),
        (lambda: nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2, affine=False)), "nn.GroupNorm"),
        (lambda: nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False)).eval(), "nn.GroupNorm"),
        (lambda: nn.InstanceNorm2d(2, affine=True, track_running_stats=True), "track_running_stats=False"),
        (lambda: nn.Embedding(4, 2, sparse=True), "sparse=False"),
        (lambda: nn.Embedding(4, 2, max_norm=1.0), "max_norm"),
    ],
)
def test_layers_without_exact_statistics_are_refused(model, match):
    model = model()
    with pytest.raises(CoverageError, match=match):
        attach(model)
    assert not any("_gradstats_leaf" in m.__dict__ for m in model.modules())


def test_batch_norm_switched_to_training_after_attach_is_refused():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).eval()
    attach(model)
    model(torch.randn(3, 2))
    model.train()
    with pytest.raises(CoverageError, match="nn.GroupNorm"):
        model(torch.randn(3, 2))


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Linear(4, 3), torch.randn(4)),
        (nn.Conv2d(2, 3, 1), torch.randn(2, 4, 4)),
        (nn.LayerNorm(4), torch.randn(4)),
        (nn.InstanceNorm1d(3, affine=True), torch.randn(3, 4)),
    ],
)
def test_unbatched_inputs_are_refused(layer, x):
    attach(layer)
    with pytest.raises(CoverageError, match="unsqueeze"):
        layer(x)


def test_coverage_table():
    model = nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(4, 2, batch_first=True), nn.LayerNorm(4))
    model[2].bias.requires_grad_(False)
    lines = attach(model).coverage().splitlines()
    assert lines[0].split() == ["parameter", "shape", "uses", "served", "by", "why"]
    assert any("0.weight" in line and "rule Linear" in line for line in lines)
    assert any("1.out_proj.bias" in line and "vmap over MultiheadAttention" in line for line in lines)
    assert any("2.bias" in line and "frozen" in line for line in lines)
    assert len(lines) == 2 + len(list(model.parameters()))


class Functional(nn.Module):
    """Uses a child's weight outside of it, so that the probe makes it a vmap leaf."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.a(x) @ self.b.weight + self.b(x)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_ignore_the_same_parameters(duplicate):
    """Also when the boundary of a leaf moves up after the copy was made."""
    model = nn.Sequential(Functional())
    attach(model, ignore=["0.a.weight"])
    other = duplicate(model)
    other(torch.randn(4, 3)).sum().backward()
    stats = gradstats.attached(other)
    assert list(stats.second_moment) == ["0.a.bias", "0.b.weight", "0.b.bias"]
    assert "0.a.weight (3, 3) ignored" in " ".join(stats.coverage().split())


@pytest.mark.parametrize(
    ("wrong", "way_out"),
    [
        (lambda model: attach(model, ["norms"]), "a statistic is a name"),
        (lambda model: attach(model, ignore="0.weight"), r"ignore=\['0.weight'\]"),
        (lambda model: gradstats.per_example_gradients(model, loss_of, None, None, loss_reduction="maen"), "maen"),
    ],
)
def test_arguments_of_the_wrong_kind_are_named(setting, wrong, way_out):
    model, _, _, _, handle = setting
    handle.detach()
    with pytest.raises(MissingStatistic, match="is detached"):
        handle.second_moment["0.weight"]
    with pytest.raises(MissingStatistic, match="is detached"):
        _ = attach(model, "norms").norms.total
    gradstats.attached(model).detach()
    with pytest.raises(GradstatsError, match=way_out):
        wrong(model)
    assert repr(attach(model)).startswith("FusedHandle(Sequential: second_moment")


class OneDimensionalPositions(nn.Module):
    """Position ids (t,), a tied head and the loss beside the logits, as many a GPT is written."""

    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(7, 4), nn.Embedding(6, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids, targets=None):
        logits = self.head((self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))).tanh())
        return logits, None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def test_position_ids_without_a_dimension_of_examples():
    model, ids, targets = OneDimensionalPositions(), torch.randint(0, 7, (5, 6)), torch.randint(0, 7, (5, 6))
    gradstats.verify(model, lambda out, y: F.cross_entropy(out[0].flatten(0, 1), y.flatten()), ids, targets)
    handle = attach(model)
    model(ids, targets)[1].backward()
    assert "positions.weight  (6, 4)  1     rule Embedding" in handle.coverage()


def test_what_all_examples_share_and_does_not_broadcast_moves_the_boundary():
    class Bias(OneDimensionalPositions):
        def forward(self, ids, targets=None):
            return self.head(self.tokens(ids)) + self.positions(torch.arange(6)).t().sum(0)[: ids.shape[1]].unsqueeze(1)

    model, ids = Bias(), torch.randint(0, 7, (5, 6))
    gradstats.verify(model, lambda out, y: out.square().mean(), ids, None)
    handle = attach(model)
    handle.probe(ids)
    assert "vmap over Bias" in handle.coverage()
