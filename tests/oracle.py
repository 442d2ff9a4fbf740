"""The oracle of every test: one backward pass per example, with its share of the batch loss's cotangent, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

STATISTICS = ("second_moment", "variance", "norms")  # that `errors` compares
TINY = 1e-300  # zero against zero is no error


def to_double(what):
    return tree_map(lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t, what)


def contributions(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    x: Any,
    y: Any,
    cut: Sequence[str | int] = (),
    example_dim: int = 0,
    ignore: Sequence[str] = (),
) -> dict[str, Tensor]:
    """c_b (B, *shape) of every trainable parameter but those in `ignore`; the model must not be attached.

    x is a tensor, a tuple of positional arguments or a dict of keyword arguments. `cut` are the keys of the outputs
    through which alone the loss depends on the parameters, each with an equal number of consecutive rows an example;
    none means the whole output. Up to the cut examples do not mix, after it they may.
    """
    model = copy.deepcopy(model).double()
    model.zero_grad()
    output = call(model, to_double(x))
    loss = loss_fn(output, to_double(y))
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad and name not in ignore}

    def backward(tensors: Sequence[Tensor], cotangents: Sequence[Tensor] | None = None) -> dict[str, Tensor]:
        """By accumulation, since torch.autograd.grad does not reach into reentrant checkpoints."""
        torch.autograd.backward(tensors, cotangents, retain_graph=True)
        gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in parameters.items()}
        model.zero_grad()
        return gradients

    cuts = tree_leaves([output[key] for key in cut] if cut else output)
    cotangents = torch.autograd.grad(loss, cuts, retain_graph=True)
    examples = cuts[0].shape[example_dim]

    def of_example(t: Tensor, b: int) -> Tensor:
        return t.unflatten(example_dim, (examples, -1)).select(example_dim, b)

    rows = []
    for b in range(examples):
        shares = [torch.zeros_like(c) for c in cotangents]
        for share, cotangent in zip(shares, cotangents, strict=True):
            of_example(share, b).copy_(of_example(cotangent, b))
        rows.append(backward(cuts, shares))
    found = {name: torch.stack([row[name] for row in rows]) for name in parameters}
    for name, gradient in backward([loss]).items():
        missed = f"the cut misses gradient of '{name}'. "
        torch.testing.assert_close(found[name].sum(0), gradient, msg=lambda text, missed=missed: missed + text)
    return found


def call(model: nn.Module, x: Any) -> Any:
    if isinstance(x, dict):
        return model(**x)
    return model(*x) if isinstance(x, tuple) else model(x)


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
    """Errors of every statistic of the handle by parameter; that of the variance is relative to the second moment.

    Norms are compared as squares: the floor of the metric is one of squared gradients, and the rounding of a gradient
    that is exactly zero lies above 1e-6 of the others but far below 1e-3 of them.
    """
    q = {name: second_moment(c) for name, c in expected.items()}
    s2 = {name: variance(c) for name, c in expected.items()}
    n2 = {name: norms(c).square() for name, c in expected.items()}
    return {
        "second_moment": {k: error(handle.second_moment[k], q[k], whole(q)) for k in q},
        "variance": {
            k: float((handle.variance[k].double() - s2[k]).norm()) / max(float(q[k].norm()), 1e-6 * whole(q), TINY)
            for k in q
        },
        "norms": {k: error(handle.norms[k].square(), n2[k], whole(n2)) for k in n2},
    }


def worst(table: dict[str, dict[str, float]]) -> float:
    return max(value for row in table.values() for value in row.values())


def exact(handle, expected: dict[str, Tensor]) -> bool:
    """Whether statistics in float64 are those of the oracle's contributions."""
    return worst(errors(handle, expected)) <= 1e-10


def coupled_loss(output: Tensor, weights: Tensor) -> Tensor:
    """Smooth, unequal over examples, and coupling them: a mean of B separate losses would be the wrong oracle."""
    rows = (output.flatten(1).sin() * weights.reshape(-1, 1)).sum(1) + output.flatten(1).square().mean(1)
    return rows.mean() + torch.logsumexp(rows, 0)
