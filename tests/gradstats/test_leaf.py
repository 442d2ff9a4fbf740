"""The Function and its shadows: precision, memory, order of arguments, what is computed and what is not."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import gradstats
from gradstats import attach
from gradstats.account import shadow
from gradstats.function import LeafFunction, changeable
from tests import oracle


def test_a_shadow_has_no_memory():
    s = shadow((1000, 1000))
    assert s.is_leaf and s.requires_grad and s.stride() == (0, 0)
    assert s.untyped_storage().nbytes() == 4


def test_shadows_precede_the_parameters():
    """What hangs on a parameter's gradient (DDP's buckets) must find the statistic in place."""
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    stats = attach(model)
    ready = []
    for name, p in model.named_parameters():
        p.register_post_accumulate_grad_hook(
            lambda p, name=name: ready.append(float(stats.second_moment[name].sum()) >= 0)
        )
    model(torch.randn(5, 3)).sum().backward()
    assert ready == [True] * 4


def test_the_statistic_is_not_copied():
    """Autograd takes over what backward returned, as it does for gradients."""
    model = nn.Linear(64, 64)
    stats = attach(model)
    returned = []
    original = LeafFunction.backward

    def spy(ctx, *d):
        gradients = original(ctx, *d)
        returned.extend(g.data_ptr() for g in gradients if isinstance(g, torch.Tensor))
        return gradients

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LeafFunction, "backward", staticmethod(spy))
        model(torch.randn(5, 64)).sum().backward()
    raw = stats.window("weight", ("sum_of_squares",)).sums["sum_of_squares"]
    assert raw.data_ptr() in returned and model.weight.grad.data_ptr() in returned


def flops(model, x):
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    return counter.get_total_flops()


def test_frozen_and_unneeded_gradients_are_not_computed():
    model = nn.Linear(64, 64)
    model.weight.requires_grad_(False)
    x = torch.randn(16, 64)
    attach(model).probe(x)
    assert flops(model, x) == 2 * 16 * 64 * 64  # the forward alone


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    """The layer runs in low precision as torch's would; squares are of low-precision contributions, in float32."""
    make = lambda: nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 5))  # noqa: E731
    model, x, y = make(), torch.randn(16, 3, 32), torch.randint(0, 5, (16,))
    plain = copy.deepcopy(model)

    def loss(output, y):
        return F.cross_entropy(output.mean(1), y)

    expected = oracle.contributions(model, loss, x, y)
    stats = attach(model, "second_moment", "norms", "variance")
    for m in (model, plain):
        with torch.autocast("cpu", dtype=dtype):
            output = m(x)
        assert output.dtype == dtype
        # A scaled loss, as GradScaler's: squares of scaled gradients overflow float16.
        (loss(output.float(), y) * 1024).backward()
    for p, reference in zip(model.parameters(), plain.parameters(), strict=True):
        assert p.grad.dtype == torch.float32
        torch.testing.assert_close(p.grad, reference.grad, rtol=2e-2, atol=2e-2 * reference.grad.abs().max().item())
    for name, c in expected.items():
        q = oracle.second_moment(c) * 1024**2
        assert stats.second_moment[name].dtype == torch.float32
        assert (stats.second_moment[name] - q).norm() <= 3e-2 * q.norm()
        assert (stats.norms[name] - oracle.norms(c) * 1024).norm() <= 2e-2 * (oracle.norms(c) * 1024).norm()


def test_a_second_use_is_seen_under_autocast_too():
    """The cast between leaf and parameter makes another tensor of the gradient: values are compared, once."""
    model = nn.Linear(8, 4)
    attach(model)
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(torch.randn(3, 8)).sum().backward()
        model.zero_grad()
    other = nn.Linear(8, 4)
    attach(other)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = other(torch.randn(3, 8)).sum() + other.weight.square().sum()
    with pytest.raises(gradstats.CoverageError, match="outside of its layer"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_parameters(dtype):
    model = nn.Linear(8, 4).to(dtype)
    stats = attach(model)
    x = torch.full((3, 8), 300.0, dtype=dtype)
    model(x).sum().backward()
    assert model.weight.grad.dtype == dtype
    q = stats.second_moment["weight"]
    assert q.dtype == torch.float32
    torch.testing.assert_close(q, torch.full((4, 8), 9 * 300.0**2))


@pytest.mark.parametrize("strength", [1.0, 1e-6])
def test_a_penalty_is_seen_however_small(strength):
    model = nn.Linear(8, 4)
    attach(model)
    loss = model(torch.randn(3, 8)).sum() + strength * model.weight.square().sum()
    with pytest.raises(gradstats.CoverageError, match="outside of its layer"):
        loss.backward()


def test_an_output_that_is_kept_stays_a_view():
    """Autograd tells by its version that what a backward pass needs was changed."""
    base = torch.zeros(6)
    view = base.view(2, 3)
    free = changeable(view, (torch.zeros(6), None))
    assert free._base is None and free.data_ptr() == base.data_ptr()
    for kept in (base, base[:3], view):
        assert changeable(view, (None, kept)) is view


def test_user_hooks_run_once_after_the_probe():
    model = nn.Sequential(nn.Linear(3, 3), nn.MultiheadAttention(3, 1, batch_first=True))
    calls = []
    model[0].register_forward_hook(lambda *a: calls.append("linear"))
    model[1].register_forward_hook(lambda *a: calls.append("attention"))
    attach(model)
    for _ in range(2):
        calls.clear()
        x = model[0](torch.randn(2, 4, 3))
        model[1](x, x, x)
    assert calls == ["linear", "attention"]
