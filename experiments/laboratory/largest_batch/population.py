"""Gradient, noise and curvature of the mean loss of many examples: the training set, or a sample of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import gradstats
from experiments.data import Split
from experiments.estimate import Array
from experiments.laboratory.problem import backward, mean_loss

PRECISION = 1e-3  # of an eigenvalue
ITERATIONS = 1000  # of Lanczos, at most


def gradient(model: nn.Module, split: Split) -> Tensor:
    backward(model, split.x, split.y)
    return flat([p.grad for p in model.parameters() if p.grad is not None])


def variance(model: nn.Module, split: Split) -> Tensor:
    """Of per-example gradients, for each element."""
    found = gradstats.compute(model, mean_loss, split.x, split.y, statistics=["variance"]).variance
    return flat([found[name] for name, _ in model.named_parameters()])


def hessian(model: nn.Module, split: Split) -> Callable[[Tensor], Tensor]:
    """v -> H v."""
    parameters = list(model.parameters())
    with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
        slopes = torch.autograd.grad(mean_loss(model(split.x), split.y), parameters, create_graph=True)
    slope = torch.cat([g.flatten() for g in slopes])

    def product(v: Tensor) -> Tensor:
        return flat(torch.autograd.grad(slope, parameters, v.to(slope.dtype), retain_graph=True))

    return product


def sharpness(model: nn.Module, split: Split, scale: Tensor) -> float:
    """The largest eigenvalue of P^-1/2 H P^-1/2, which is that of P^-1 H over elements whose P is finite, by Lanczos'
    iteration on products of the Hessian with vectors: it needs fewer of them than the power iteration, and finds the
    largest, not the longest."""
    times, root, size = hessian(model, split), scale.rsqrt(), len(scale)

    def product(vector: Array) -> Array:
        turned: Array = (root * times(root * torch.from_numpy(np.asarray(vector, dtype=float).ravel()))).numpy()
        return turned

    operator = LinearOperator((size, size), matvec=product, dtype=np.float64)
    start = np.random.default_rng(0).normal(size=size)
    (largest,) = eigsh(
        operator, k=1, which="LA", v0=start, tol=PRECISION, maxiter=ITERATIONS, return_eigenvectors=False
    )
    return float(largest)


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """In float64, in which they are summed."""
    return torch.cat([t.detach().flatten() for t in tensors]).double()
