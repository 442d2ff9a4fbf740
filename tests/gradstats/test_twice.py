"""Second derivatives of attached models, and derivatives taken by other means than a backward pass: those of torch."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, hessian, jacrev, jvp, vmap
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from gradstats import CoverageError, LifetimeError, MissingStatistic, attach
from tests import oracle
from tests.layers import LAYERS, RECURRENT, B

# torch.func does not run where activations are recomputed, and reentrant checkpointing refuses torch.autograd.grad.
# Of embedding bags, and of fused attention on the CPU, torch has no second derivative.
ROWS = {
    name: row
    for name, row in (LAYERS | RECURRENT).items()
    if not name.startswith(("embedding bag", "multi-head", "transformer layer", "checkpointed, reentrant"))
}


def network():
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()


class Shared(nn.Module):
    """One layer twice: the gradients of its uses wait for each other."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(5, 5), nn.Linear(5, 3)
        self.double()

    def forward(self, x):
        return self.head(self.layer(self.layer(x).tanh()).tanh())


class Checkpointed(nn.Sequential):
    """Whose saved tensors may be read once only."""

    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


def checkpointed():
    return Checkpointed(*network())


def problem():
    return torch.randn(B, 5).double(), torch.randint(3, (B,))


def derivatives(model, x, weights):
    """Gradients and a Hessian-vector product, of parameters and inputs."""
    wanted = [t for t in (*model.parameters(), *tree_leaves(x)) if isinstance(t, torch.Tensor) and t.requires_grad]
    loss = oracle.coupled_loss(oracle.call(model, x), weights)
    first = torch.autograd.grad(loss, wanted, create_graph=True, allow_unused=True, materialize_grads=True)
    draws = torch.Generator().manual_seed(1)
    along = sum((g * torch.randn(g.shape, generator=draws, dtype=g.dtype)).sum() for g in first)
    return *first, *torch.autograd.grad(along, wanted, allow_unused=True, materialize_grads=True)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", ROWS)
def test_hessian_vector_products(name):
    row = ROWS[name]
    model, weights = row.make().double(), torch.rand(B).double() + 0.5
    x = oracle.to_double(row.x())
    for t in tree_leaves(x):
        if isinstance(t, torch.Tensor):
            t.requires_grad_(t.is_floating_point())
    expected = derivatives(copy.deepcopy(model), x, weights)
    attach(model)
    for found, reference in zip(derivatives(model, x, weights), expected, strict=True):
        torch.testing.assert_close(found, reference, rtol=1e-9, atol=1e-10)


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
@pytest.mark.parametrize("make", [network, Shared, checkpointed])
def test_a_backward_pass_that_creates_its_graph_has_statistics_too(make):
    model, (x, y) = make(), problem()
    expected = oracle.contributions(model, F.cross_entropy, x, y)
    plain = copy.deepcopy(model)
    stats = attach(model, *oracle.STATISTICS)

    def diagonal(model):
        F.cross_entropy(model(x), y).backward(create_graph=True)
        gradients = [p.grad for p in model.parameters()]
        return torch.autograd.grad(gradients, list(model.parameters()), [g.detach() for g in gradients])

    for found, reference in zip(diagonal(model), diagonal(plain), strict=True):
        torch.testing.assert_close(found, reference, rtol=1e-9, atol=1e-12)
    assert oracle.exact(stats, expected)


@pytest.mark.parametrize("make", [network, checkpointed])
def test_statistics_beside_a_product(make):
    """What is measured between forward and backward passes leaves no trace."""
    model, (x, y) = make(), problem()
    expected = oracle.contributions(model, F.cross_entropy, x, y)
    stats = attach(model, *oracle.STATISTICS)
    loss = F.cross_entropy(model(x), y)
    derivatives(model, x.clone().requires_grad_(), torch.ones(B).double())
    loss.backward()
    derivatives(model, x.clone().requires_grad_(), torch.ones(B).double())
    assert stats.batch_size == B and oracle.exact(stats, expected)


def test_a_gradient_penalty_is_refused():
    model, (x, y) = network(), problem()
    attach(model)
    x.requires_grad_()
    loss = F.cross_entropy(model(x), y)
    (g,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(CoverageError, match="outside of its layer"):
        (loss + g.square().sum()).backward()


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
def test_a_penalty_on_gradients_of_parameters_is_refused():
    model, (x, y) = network(), problem()
    attach(model)
    F.cross_entropy(model(x), y).backward(create_graph=True)
    with pytest.raises(LifetimeError, match="backpropagated twice"):
        sum(p.grad.square().sum() for p in model.parameters()).backward()


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
def test_a_parameter_that_was_changed_since_is_noticed():
    """Of a rule that does not save it, since its gradients do not need it."""
    model, x = nn.GRU(5, 4, batch_first=True).double(), torch.randn(B, 2, 5).double()
    attach(model)
    loss = model(x)[0].sin().sum()
    with torch.no_grad():
        model.bias_hh_l0.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward(create_graph=True)


def test_an_input_of_which_a_copy_is_saved_is_not_kept():
    model, saved = nn.GroupNorm(2, 4).double(), []
    x = torch.randn(B, 4, 3, 3).double().contiguous(memory_format=torch.channels_last).requires_grad_()
    attach(model)
    model(x)  # probed
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        y = model(x)
    assert saved.count(x.shape) == 1
    (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()


class PartlyMapped(nn.Module):
    """One layer twice, once under torch.func.vmap."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(5, 5), nn.Linear(5, 3)
        self.double()

    def forward(self, x):
        return self.head(self.layer(vmap(self.layer)(x).tanh()).tanh())


def test_a_transform_within_a_forward():
    model, (x, y) = PartlyMapped(), problem()
    expected = oracle.contributions(model, F.cross_entropy, x, y)
    stats = attach(model, *oracle.STATISTICS)
    F.cross_entropy(model(x), y).backward()
    assert oracle.exact(stats, expected)


def tangent(model, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(model(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


def curvature(model, x):
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    return hessian(
        lambda b: functional_call(model, {**parameters, "2.bias": b}, (x,)).logsumexp(1).sum(),
    )(parameters["2.bias"])


OTHERS = {
    "jacobian of every example": lambda model, x: vmap(jacrev(model))(x),
    "jacobian-vector product": lambda model, x: jvp(model, (x,), (torch.ones_like(x),))[1],
    "forward-mode": tangent,
    "hessian": curvature,
}


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # of torch's own forward mode
@pytest.mark.parametrize("name", OTHERS)
def test_other_transforms(name):
    model, (x, y) = network(), problem()
    expected = OTHERS[name](copy.deepcopy(model), x)
    statistics = oracle.contributions(model, F.cross_entropy, x, y)
    stats = attach(model, *oracle.STATISTICS)
    for _ in range(2):  # before the model is probed, and after
        torch.testing.assert_close(OTHERS[name](model, x), expected, rtol=1e-9, atol=1e-12)
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        assert oracle.exact(stats, statistics)


def test_a_transform_outside_of_forwards_leaves_no_statistics():
    model, (x, y) = network(), problem()
    stats = attach(model)
    F.cross_entropy(model[2](vmap(model[0])(x).tanh()), y).backward()
    with pytest.raises(MissingStatistic, match="no backward pass has reached it"):
        _ = stats.second_moment["0.weight"]
