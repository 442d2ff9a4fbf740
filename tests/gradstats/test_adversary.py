"""Ways in which an adversary made a statistic silently wrong, once: exact by now, or refused."""

import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

import gradstats
from gradstats import CoverageError, GradstatsError, LifetimeError, attach
from gradstats.optim import BatchInvariantAdam
from tests import oracle
from tests.allocations import LargestAllocation

B = 6


def loss_of(output, y):
    return F.cross_entropy(output, y)


def problem():
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    x, y = torch.randn(B, 5).double(), torch.randint(0, 3, (B,))
    return model, x, y


# The forward must stay what it was


class Standardised(nn.Conv2d):
    """Overrides the method in which a convolution computes, and leaves `forward` alone."""

    def _conv_forward(self, x, weight, bias):
        weight = (weight - weight.mean((1, 2, 3), keepdim=True)) / weight.std((1, 2, 3), keepdim=True)
        return super()._conv_forward(x, weight, bias)


def test_overridden_inner_method_is_another_layer():
    model, x, weights = Standardised(2, 3, 3).double(), torch.randn(4, 2, 5, 5).double(), torch.rand(4).double()
    plain = model(x).detach()
    expected = oracle.contributions(model, oracle.coupled_loss, x, weights)
    handle = attach(model, *oracle.STATISTICS)
    output = model(x)
    torch.testing.assert_close(output, plain)
    oracle.coupled_loss(output, weights).backward()
    assert oracle.exact(handle, expected)


class Owner(nn.Module):
    """Owns a bare parameter, so that it becomes a vmap leaf; `mix` is what it does besides."""

    def __init__(self, mix, child=None):
        super().__init__()
        self.scale, self.mix, self.child = nn.Parameter(torch.ones(3)), mix, child

    def forward(self, x, *shared):
        x = x if self.child is None else self.child(x)
        return self.mix(x, *shared) * self.scale


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (lambda: Owner(lambda x: x - x.mean(0)), (torch.randn(B, 3),)),
        (lambda: Owner(lambda x: x / x.shape[0]), (torch.randn(B, 3),)),
        (lambda: Owner(lambda x: x, nn.BatchNorm1d(3, affine=False, track_running_stats=False)), (torch.randn(B, 3),)),
    ],
)
def test_vmap_leaves_that_would_change_the_forward_are_refused(model, inputs):
    def run():
        attached = model()
        attach(attached)
        attached(*inputs)

    for call in (run, lambda: gradstats.per_example_gradients(model(), lambda o, y: o.mean(), inputs, None)):
        with pytest.raises(CoverageError, match=r"depends on the other examples|nn.GroupNorm"):
            call()


def test_writing_to_a_buffer_under_vmap_is_refused():
    class Counts(Owner):
        def __init__(self):
            super().__init__(lambda x: x)
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x):
            self.seen += x.shape[0]
            return super().forward(x)

    model = Counts()
    attach(model)
    with pytest.raises(CoverageError, match="buffer"):
        model(torch.randn(B, 3))


def test_leading_one_is_expanded_for_position_ids_only():
    class Hyper(nn.Module):
        def __init__(self):
            super().__init__()
            self.z, self.layer = torch.randn(1, 4), nn.Linear(4, 15)

        def forward(self, x):
            return x @ self.layer(self.z)[0].view(3, 5).T

    model = Hyper()
    attach(model)
    with pytest.raises(CoverageError, match="'layer'"):
        model(torch.randn(B, 5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rms_norm_default_eps_in_low_precision(dtype):
    """torch's default eps depends on the dtype in which it computes, and decides where inputs are small."""
    x = (torch.randn(4, 3, 32) * 0.02).to(dtype)
    gradients = []
    for attached in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 32), nn.RMSNorm(32), nn.Linear(32, 5)).to(dtype)
        if attached:
            attach(model)
        model(x).float().square().mean().backward()
        gradients.append(torch.cat([p.grad.float().flatten() for p in model.parameters()]))
    assert (gradients[0] - gradients[1]).norm() <= 2e-2 * gradients[0].norm()


def test_complex_parameters_are_refused():
    with pytest.raises(CoverageError, match="complex"):
        attach(nn.Linear(3, 2, dtype=torch.complex64))


def test_uninitialised_parameters_are_refused():
    with pytest.raises(CoverageError, match="call the model once"):
        attach(nn.LazyLinear(3))


def test_padding_index_set_after_construction():
    model, ids, weights = nn.Embedding(7, 4).double(), torch.randint(0, 7, (B, 9)), torch.rand(B).double()
    model.padding_idx = -1
    expected = oracle.contributions(model, oracle.coupled_loss, ids, weights)
    handle = attach(model, *oracle.STATISTICS)
    oracle.coupled_loss(model(ids), weights).backward()
    assert oracle.exact(handle, expected)


@pytest.mark.parametrize(
    "rename", [lambda m: nn.utils.weight_norm(m), lambda m: prune.l1_unstructured(m, "weight", 0.5)]
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_tools_that_rename_parameters_are_refused(rename):
    model = nn.Sequential(rename(nn.Linear(4, 3)))
    with pytest.raises(CoverageError, match="parametrizations"):
        attach(model)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # torch's, of weight_norm under vmap
def test_parametrizations_are_exact_and_can_come_after_attach():
    model, x, y = problem()
    parametrizations.weight_norm(model[0])
    expected = oracle.contributions(model, loss_of, x, y)
    handle = attach(model, *oracle.STATISTICS)
    loss_of(model(x), y).backward()
    assert oracle.exact(handle, expected)
    parametrizations.weight_norm(model[2])
    handle.detach()
    model(x)
    assert not any("_gradstats_leaf" in m.__dict__ for m in model.modules())


# What counts


@pytest.mark.parametrize("of", ["parameters", "input"])
def test_autograd_grad_after_a_backward_counts_nothing(of):
    model, x, y = problem()
    expected = oracle.contributions(model, loss_of, x, y)
    handle = attach(model, *oracle.STATISTICS)
    loss_of(model(x), y).backward()
    other = torch.randn(9, 5).double().requires_grad_()
    torch.autograd.grad(model(other).sum(), list(model.parameters()) if of == "parameters" else other)
    assert handle.batch_size == B and oracle.exact(handle, expected)


def test_backward_into_chosen_inputs_is_never_half_counted():
    model, x, y = problem()
    handle = attach(model, *oracle.STATISTICS)
    loss_of(model(x), y).backward()
    loss_of(model(-x), y).backward(inputs=list(model.parameters()))
    with pytest.raises(LifetimeError, match="changed in place"):
        handle.variance["0.weight"]
    loss_of(model(x), y).backward()
    with pytest.raises(LifetimeError, match="more than these statistics have seen"):
        handle.second_moment["0.weight"]


def test_parameters_of_one_layer_zeroed_at_different_times():
    model, x, y = problem()
    expected = oracle.contributions(model, loss_of, x, y)
    handle = attach(model, *oracle.STATISTICS)
    loss_of(model(-x), y).backward()
    model[0].weight.grad = model[2].weight.grad = None
    loss_of(model(x), y).backward()
    for name in ("0.weight", "2.weight"):
        c = expected[name]
        torch.testing.assert_close(handle.second_moment[name], oracle.second_moment(c))
        torch.testing.assert_close(handle.variance[name], oracle.variance(c))
        torch.testing.assert_close(handle.norms[name], oracle.norms(c))
    assert len(handle.norms["0.bias"]) == 2 * B


def test_frozen_parameters_with_old_gradients_do_not_keep_the_window_open():
    model, x, y = problem()
    handle = attach(model, *oracle.STATISTICS)
    loss_of(model(x), y).backward()
    for layer in (model[0], model[2]):
        layer.weight.requires_grad_(False)
    optimizer = BatchInvariantAdam([model[0].bias, model[2].bias], lr=0.0, batch_size=B)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model(x), y).backward()
        optimizer.step()
    assert handle.batch_size == B and optimizer.state[model[0].bias]["step"] == 3 * B


@pytest.mark.parametrize(
    "spoil",
    [
        lambda m: setattr(m[0].weight, "grad", m[0].weight.grad * 0.1),
        lambda m: m[0].weight.grad.mul_(0.1),
        lambda m: m[0].weight.square().sum().backward(),
    ],
)
def test_gradient_that_the_window_has_not_seen_is_refused(spoil):
    model, x, y = problem()
    handle = attach(model, *oracle.STATISTICS)
    loss_of(model(x), y).backward()
    spoil(model)
    with pytest.raises(LifetimeError):
        handle.variance["0.weight"]
    loss_of(model(x), y).backward()
    with pytest.raises(LifetimeError, match="more than these statistics"):
        handle.second_moment["0.weight"]


@pytest.mark.parametrize("options", [{}, {"engine": "microbatch"}])
def test_another_gradient_at_the_same_address_is_refused(options):
    """The allocator gives an address again, to a tensor that has been changed as often."""
    model, x, y = problem()
    handle, weight = attach(model, **options), model[0].weight
    loss_of(model(x), y).backward()
    other = weight.grad.detach()
    other.data.mul_(3)
    weight.grad = other
    loss_of(model(x), y).backward()
    with pytest.raises(LifetimeError, match="more than these statistics"):
        handle.second_moment["0.weight"]


@pytest.mark.parametrize(
    "within",
    [
        lambda w: setattr(w, "grad", torch.ones_like(w)),
        lambda w: torch.enable_grad()(lambda: w.square().sum().backward())(),
    ],
)
def test_gradient_set_within_the_backward_pass_is_refused(within):
    model, x, y = problem()
    handle = attach(model, *oracle.STATISTICS)
    model[2].weight.register_post_accumulate_grad_hook(lambda _: within(model[0].weight))
    loss_of(model(x), y).backward()
    with pytest.raises(LifetimeError, match="more than these statistics"):
        handle.second_moment["0.weight"]


def test_parameter_frozen_after_the_forward_does_not_move_by_its_old_gradient():
    model, x, y = problem()
    handle, optimizer = attach(model, "second_moment"), BatchInvariantAdam(model.parameters(), lr=0.1, batch_size=B)
    loss_of(model(x), y).backward()
    for p in [*model.parameters()][1:]:
        p.grad = None
    loss = loss_of(model(-x), y)
    model[0].weight.requires_grad_(False)
    loss.backward()
    assert handle.batch_size == B
    with pytest.raises(LifetimeError, match="more than these statistics"):
        optimizer.step()


def test_gradient_older_than_attach_is_refused():
    model, x, y = problem()
    loss_of(model(x), y).backward()
    handle = attach(model, *oracle.STATISTICS)
    loss_of(model(x), y).backward()
    with pytest.raises(LifetimeError, match="older than attach"):
        handle.second_moment["0.weight"]


def test_zeros_assigned_as_gradient_start_afresh():
    model, x, y = problem()
    expected = oracle.contributions(model, loss_of, x, y)
    handle = attach(model, *oracle.STATISTICS)
    loss_of(model(-x), y).backward()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    loss_of(model(x), y).backward()
    assert handle.batch_size == B and oracle.exact(handle, expected)


class Segments(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(5, 7), nn.Linear(7, 7), nn.Linear(7, 3)

    def forward(self, x):
        return self.head(checkpoint(self.b, self.a(x).tanh(), use_reentrant=True).tanh())


def test_reentrant_checkpointing_with_two_forwards_before_the_backwards():
    model, (_, x, y) = Segments().double(), problem()
    expected = oracle.contributions(model, loss_of, x, y)
    handle = attach(model, *oracle.STATISTICS)
    first, second = loss_of(model(-x), y), loss_of(model(x), y)
    first.backward()
    model.zero_grad()
    second.backward()
    assert handle.batch_size == B and oracle.exact(handle, expected)


def test_reentrant_checkpointing_with_declared_new_examples():
    model, (_, x, y) = Segments().double(), problem()
    expected = oracle.contributions(model, loss_of, x, y)
    handle = attach(model, *oracle.STATISTICS)
    first = loss_of(model(x[:2]), y[:2]) * 2 / B
    handle.new_examples()
    (first + loss_of(model(x[2:]), y[2:]) * 4 / B).backward()
    assert handle.batch_size == B and oracle.exact(handle, expected)


def test_functional_tying_across_a_reentrant_segment_is_refused():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.layer = nn.Embedding(7, 4), nn.Linear(4, 4)

        def forward(self, ids):
            dummy = torch.zeros((), dtype=torch.float64, requires_grad=True)
            h = checkpoint(lambda i, d: self.layer(self.embedding(i) + d), ids, dummy, use_reentrant=True)
            return F.linear(h, self.embedding.weight)

    model, ids = Tied().double(), torch.randint(0, 7, (B, 3))
    handle = attach(model)
    for _ in range(2):
        try:
            model(ids).square().mean().backward()
            q = handle.second_moment["embedding.weight"]
        except GradstatsError:
            pass
        else:
            c = oracle.contributions(Tied().double(), lambda o, y: o.square().mean(), ids, None)
            torch.testing.assert_close(q, oracle.second_moment(c["embedding.weight"]))
        model.zero_grad()


def test_an_older_graph_backpropagated_after_a_newer_one_is_refused():
    model, x, y = problem()
    attach(model, *oracle.STATISTICS)
    zeroth, first = loss_of(model(x), y), loss_of(model(-x), y)
    first.backward()
    loss_of(model(2 * x), y).backward()
    with pytest.raises(LifetimeError, match="by two forwards"):
        zeroth.backward()


def test_functional_call_leaves_no_trace():
    model, x, y = problem()
    expected = oracle.contributions(model, loss_of, x, y)
    handle = attach(model, *oracle.STATISTICS)
    loss_of(model(x), y).backward()
    doubled = {name: 2 * p for name, p in model.named_parameters()}
    torch.func.functional_call(model, doubled, (x,)).sum().backward(inputs=[x.requires_grad_()])
    assert handle.batch_size == B and oracle.exact(handle, expected)
    handle.detach()
    assert not any(p._backward_hooks for p in model.parameters())


def test_replaced_parameter_starts_afresh():
    model, x, y = problem()
    handle = attach(model, *oracle.STATISTICS)
    loss_of(model(x), y).backward()
    model.zero_grad()
    old = model[0].weight
    model[0].weight = nn.Parameter(old.detach() * 2)
    bare = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    bare.load_state_dict(model.state_dict())
    expected = oracle.contributions(bare, loss_of, x, y)
    loss_of(model(x), y).backward()
    assert oracle.exact(handle, expected) and not old._backward_hooks


def test_conversion_after_a_step():
    model, x, y = problem()
    handle = attach(model.float(), *oracle.STATISTICS)
    loss_of(model(x.float()), y).backward()
    model.zero_grad()
    model.double()
    bare = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    bare.load_state_dict(model.state_dict())
    expected = oracle.contributions(bare, loss_of, x, y)
    loss_of(model(x), y).backward()
    assert oracle.exact(handle, expected)


def test_a_parameter_of_two_attached_models_is_refused():
    a, b = nn.Linear(4, 4), nn.Linear(4, 4)
    b.weight = a.weight
    attach(a)
    attach(b)
    x = torch.randn(2, 4)
    a(x).sum().backward()
    with pytest.raises(GradstatsError, match="two attached models"):
        b(x)


def test_tied_but_frozen_parameters_are_no_obstacle():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model[1].weight = model[0].weight
    model[0].weight.requires_grad_(False)
    stats = attach(model)
    model(torch.randn(2, 4)).sum().backward()
    assert set(stats.second_moment) == {"0.bias", "1.bias", "2.weight", "2.bias"}


def test_parameter_that_the_loss_does_not_depend_on():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x):
            return self.used(x)

    model, x, y = Unused(), torch.randn(5, 4), torch.randint(0, 3, (5,))
    assert gradstats.verify(model, F.cross_entropy, x, y).worst.error <= 1e-10
    result = gradstats.compute(model, F.cross_entropy, x, y, oracle.STATISTICS)
    assert set(result.second_moment) == {"used.weight", "used.bias"}
    handle = attach(model, *oracle.STATISTICS)
    F.cross_entropy(model(x), y).backward()
    torch.testing.assert_close(handle.norms.total, result.total_norms)


def test_evaluation_of_another_size_before_a_checkpointed_backward():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.positions, self.head = nn.Embedding(7, 4), nn.Embedding(3, 4), nn.Linear(4, 3)

        def embed(self, ids, dummy):
            return self.tokens(ids) + self.positions(torch.arange(3).unsqueeze(0)) + dummy

        def forward(self, ids):
            dummy = torch.zeros((), dtype=torch.float64, requires_grad=True)
            return self.head(checkpoint(self.embed, ids, dummy, use_reentrant=True).mean(1))

    model, ids, y = Positions().double(), torch.randint(0, 7, (B, 3)), torch.randint(0, 3, (B,))
    expected = oracle.contributions(model, loss_of, ids, y)
    handle = attach(model, *oracle.STATISTICS)
    loss = loss_of(model(ids), y)
    with torch.no_grad():
        model(torch.randint(0, 7, (2, 3)))
    loss.backward()
    assert oracle.exact(handle, expected)


def test_empty_batches_are_refused():
    model, x, _ = problem()
    attach(model)
    with pytest.raises(CoverageError, match="without examples"):
        model(x[:0])


# The optimizer


def test_grad_scaler_changes_nothing():
    """Gradients and squares carry the loss scale, once and twice; a step with inf is skipped; unscale_ is refused."""
    results = []
    for scale in (None, 2.0**10):
        torch.manual_seed(0)
        model, x, y = problem()
        attach(model)
        optimizer = BatchInvariantAdam(model.parameters(), lr=0.01, batch_size=64, reference_batch_size=2)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        for _ in range(3):
            optimizer.zero_grad()
            scaler.scale(loss_of(model(x), y)).backward()
            scaler.step(optimizer)
            scaler.update()
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)

    before, steps = results[1].clone(), int(optimizer.state[model[0].weight]["step"])
    optimizer.zero_grad()
    scaler.scale(loss_of(model(x), y)).backward()
    model[0].weight.grad[0, 0] = torch.inf
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(before, torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert int(optimizer.state[model[0].weight]["step"]) == steps

    optimizer.zero_grad()
    scaler.scale(loss_of(model(x), y)).backward()
    scaler.unscale_(optimizer)
    with pytest.raises(GradstatsError, match="max_norm"):
        scaler.step(optimizer)


def test_estimates_across_steps_never_make_a_root_of_a_negative():
    """Batches on both sides of R: what was negative in the average stays floored."""
    p = nn.Linear(1, 1, bias=False).double()
    attach(p)
    optimizer = BatchInvariantAdam(p.parameters(), batch_size=256)
    for value, b in ((1.0, 256), (-20.0, 64), (1.0, 256), (1.0, 256)):
        optimizer.zero_grad()
        p(torch.full((b, 1), value).double()).mean().backward()
        optimizer.step()
        assert p.weight.isfinite().all()


@pytest.mark.parametrize("options", [{"betas": (0.0, 0.99)}, {"average": "slides", "betas": (0.1, 0.99)}])
def test_short_momentum_is_not_mistaken_for_the_first_batch(options):
    """Pure noise: v_R is sigma^2/R, far below the q/B that the batch's own mean would give."""
    p = nn.Linear(50, 1, bias=False).double()
    attach(p)
    optimizer = BatchInvariantAdam(p.parameters(), lr=0.0, batch_size=4, reference_batch_size=64, **options)
    for _ in range(400):
        optimizer.zero_grad()
        p(torch.randn(4, 50).double()).mean().backward()
        optimizer.step()
    s = optimizer.state[p.weight]["exp_avg_sq"].mean()
    assert abs(float(s) - 1 / 64) < 0.02


def test_nothing_is_left_on_the_parameters():
    model, x, y = problem()
    for _ in range(3):
        with attach(model, *oracle.STATISTICS):
            loss_of(model(x), y).backward()
        model.zero_grad()
    gc.collect()
    for p in model.parameters():
        assert not p._backward_hooks and not p._post_accumulate_grad_hooks


def test_a_hook_that_comes_after_the_first_forward_is_seen():
    model, x, y = problem()
    attach(model, *oracle.STATISTICS)
    loss_of(model(x), y).backward()
    model.zero_grad()
    model[0].weight.register_hook(lambda gradient: 2 * gradient)
    with pytest.raises(CoverageError, match="a hook that changes the gradient"):
        loss_of(model(x), y).backward()


def test_a_tied_head_forms_no_gradient_of_every_example():
    """Nothing of n x words x width, nor of n x words x positions beside the logits' own."""
    n, words, width, positions = 8, 1000, 16, 6
    model = nn.Sequential(nn.Embedding(words, width), nn.Linear(width, words, bias=False))
    model[1].weight = model[0].weight
    ids = torch.randint(0, words, (n, positions))
    attach(model).probe(ids)
    logits = model(ids)
    with LargestAllocation() as largest:
        F.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
    assert largest.elements <= max(words * width, logits.numel())
