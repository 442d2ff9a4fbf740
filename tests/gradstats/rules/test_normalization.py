"""Normalisation layers: contributions come out of the kernel that computes the gradient."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gradstats

LAYERS = {
    "group norm": lambda: nn.GroupNorm(2, 6),
    "instance norm": lambda: nn.InstanceNorm2d(6, affine=True),
}


class Large(TorchDispatchMode):
    """Names of the operations that return a tensor with a memory of its own of `numel` elements or more."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.known, self.by = numel, set(), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.known |= {
            t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)
        }
        for t in tree_leaves(result):
            own = isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in self.known
            if own and t.numel() >= self.numel:
                self.by.append(func.overloadpacket.__name__)
        return result


def trained(make, dtype):
    layer = make().to(dtype)
    with torch.no_grad():
        layer.weight.uniform_(0.5, 2)
        layer.bias.normal_()
    return layer


def backward(layer, x):
    y = layer(x)
    (y.sin() * torch.linspace(0.5, 2, y.numel(), dtype=x.dtype).view_as(y)).sum().backward()
    return [layer.weight.grad, layer.bias.grad, x.grad]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_of_the_input_is_bitwise_that_of_torch(dtype):
    layer = trained(LAYERS["group norm"], dtype)
    plain = copy.deepcopy(layer)
    gradstats.attach(layer, "norms")
    x, other = (torch.linspace(-2, 3, 5 * 6 * 4 * 3, dtype=dtype).view(5, 6, 4, 3).cos() for _ in range(2))
    found, expected = backward(layer, x.requires_grad_()), backward(plain, other.requires_grad_())
    assert torch.equal(found[2], expected[2])
    for a, b in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", LAYERS)
def test_positions_are_told_apart(name):
    layer = trained(LAYERS[name], torch.float64)
    x = torch.randn(3, 6, 2, 2, dtype=torch.float64)
    stats = gradstats.attach(layer, granularity="token", loss_reduction="sum")
    y = layer(x)
    y.square().sum().backward()
    d = 2 * y.detach().movedim(1, -1).reshape(-1, 6)  # (positions of all examples, channels)
    xhat = ((y.detach() - layer.bias.view(1, -1, 1, 1)) / layer.weight.view(1, -1, 1, 1)).movedim(1, -1).reshape(-1, 6)
    torch.testing.assert_close(stats.second_moment["weight"], (d * xhat).square().mean(0))
    torch.testing.assert_close(stats.second_moment["bias"], d.square().mean(0))


@pytest.mark.parametrize("name", LAYERS)
def test_squares_are_formed_of_what_was_not_rounded(name):
    """In bfloat16 the kernel would round an example's contribution to it."""
    layer = trained(LAYERS[name], torch.bfloat16)
    x = torch.randn(4, 6, 8, 8).bfloat16()
    stats = gradstats.attach(layer, loss_reduction="sum")
    weights = torch.randn(4, 6, 8, 8).bfloat16()
    layer(x).backward(weights)
    c = weights.double().sum((2, 3))
    torch.testing.assert_close(stats.second_moment["bias"].double(), c.square().mean(0), rtol=1e-5, atol=0)


def test_nothing_as_large_as_the_input_is_formed_beside_its_gradient():
    layer, x = nn.GroupNorm(4, 16), torch.randn(8, 16, 10, 10, requires_grad=True)
    gradstats.attach(layer, "second_moment", "norms")
    y = layer(x)
    with Large(x.numel()) as made:
        y.backward(torch.ones_like(y))
    assert [name for name in made.by if "ones" not in name] == ["native_group_norm_backward"]


@pytest.mark.parametrize("shape", [(4,), (3, 4)])
def test_rms_norm(shape):
    layer = nn.RMSNorm(shape).double()
    with torch.no_grad():
        layer.weight.uniform_(0.5, 2)
    plain = copy.deepcopy(layer)
    gradstats.attach(layer)
    x, other = (torch.linspace(-2, 3, 60, dtype=torch.float64).view(5, 3, 4).cos().requires_grad_() for _ in range(2))
    layer(x).sin().sum().backward()
    plain(other).sin().sum().backward()
    torch.testing.assert_close(x.grad, other.grad)
