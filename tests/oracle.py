"""The oracle of every test: one backward pass per example, with its share of the batch loss's cotangent, in float64."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

TINY = 1e-300  # zero against zero is no error


def to_double(what):
    return tree_map(lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t, what)


def contributions(model: nn.Module, loss_fn, x, y) -> dict[str, Tensor]:
    """c_b (B, *shape) of every trainable parameter; the model must not be attached."""
    model = copy.deepcopy(model).double()
    model.zero_grad()
    output = model(to_double(x))
    cut = output.detach().requires_grad_()
    (cotangent,) = torch.autograd.grad(loss_fn(cut, to_double(y)), cut)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for b in range(len(output)):
        share = torch.zeros_like(cotangent)
        share[b] = cotangent[b]
        output.backward(share, retain_graph=True)
        for name, p in parameters.items():
            rows[name].append(torch.zeros_like(p) if p.grad is None else p.grad)
            p.grad = None
    return {name: torch.stack(c) for name, c in rows.items()}


def second_moment(c: Tensor, mean_loss: bool = True) -> Tensor:
    g = c * len(c) if mean_loss else c
    return g.square().mean(0)


def variance(c: Tensor) -> Tensor:
    return (c * len(c)).var(0, unbiased=True)


def norms(c: Tensor) -> Tensor:
    return (c * len(c)).flatten(1).norm(dim=1)


def error(found: Tensor, expected: Tensor, whole: float) -> float:
    """||a - b|| / max(||b||, 1e-6 ||the statistic over all parameters||)."""
    return float((found.double() - expected).norm()) / max(float(expected.norm()), 1e-6 * whole, TINY)


def whole(statistic: dict[str, Tensor]) -> float:
    return float(torch.stack([t.norm() for t in statistic.values()]).norm())


def errors(handle, expected: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Errors of every statistic of the handle by parameter; that of the variance is relative to the second moment."""
    q = {name: second_moment(c) for name, c in expected.items()}
    s2 = {name: variance(c) for name, c in expected.items()}
    n = {name: norms(c) for name, c in expected.items()}
    return {
        "second_moment": {k: error(handle.second_moment[k], q[k], whole(q)) for k in q},
        "variance": {
            k: float((handle.variance[k].double() - s2[k]).norm()) / max(float(q[k].norm()), 1e-6 * whole(q), TINY)
            for k in q
        },
        "norms": {k: error(handle.norms[k], n[k], whole(n)) for k in n},
    }


def worst(table: dict[str, dict[str, float]]) -> float:
    return max(value for row in table.values() for value in row.values())


def coupled_loss(output: Tensor, weights: Tensor) -> Tensor:
    """Smooth, unequal over examples, and coupling them: a mean of B separate losses would be the wrong oracle."""
    rows = (output.flatten(1).sin() * weights.reshape(-1, 1)).sum(1) + output.flatten(1).square().mean(1)
    return rows.mean() + torch.logsumexp(rows, 0)
