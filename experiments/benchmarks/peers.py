"""The same statistics by other means: libraries of others, torch.func, and loops.

Libraries are imported where they are used: a machine without one measures the rest. Squares of per-example gradients
that a peer holds in memory are summed by vector_norm, which reads them once and allocates nothing of their size.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from experiments.benchmarks.stepper import TOTAL, Found, Stepper
from experiments.benchmarks.workloads import Problem


def squares(c: Tensor) -> Tensor:
    """sum_b c_b^2 (*shape) of contributions (B, *shape)."""
    return torch.linalg.vector_norm(c, dim=0).square_()


def squared_norms(c: Tensor) -> Tensor:
    """||c_b||^2 (B,) of contributions (B, *shape)."""
    return torch.linalg.vector_norm(c.flatten(1), dim=1).square_()


class Summed(Stepper):
    """Leaves sums of c_b: of their squares by parameter, or their squared norms (B,)."""

    def __init__(self, problem: Problem, *names: str) -> None:
        super().__init__(problem)
        self.names = names
        self.squares: dict[str, Tensor] = {}
        self.squared_norms: Tensor | None = None

    def clear(self) -> None:
        super().clear()
        self.squares, self.squared_norms = {}, None

    def statistics(self) -> Found:
        n = self.batch_size
        found: Found = {}
        if self.squared_norms is not None:
            found["norms"] = {TOTAL: n * self.squared_norms.sqrt()}
        if self.squares:
            found["second_moment"] = {name: n * c for name, c in self.squares.items()}
            m = self.gradients()
            found["variance"] = {
                name: (q - m[name].square()) * (n / (n - 1)) for name, q in found["second_moment"].items() if n > 1
            }
        return {name: found[name] for name in self.names}


class Loop(Summed):
    """One backward pass per example."""

    def __init__(self, problem: Problem, *names: str) -> None:
        super().__init__(problem, *(names or ("second_moment",)))

    def step(self) -> None:
        parameters = self.problem.parameters()
        weights = list(parameters.values())
        total = [torch.zeros_like(p) for p in weights]
        squares = [torch.zeros_like(p) for p in weights]
        norms = []
        for x, y in zip(self.problem.x.split(1), self.problem.y.split(1), strict=True):
            loss = self.problem.losses_of(self.forward, x, y).sum() / self.batch_size
            c = torch.autograd.grad(loss, weights)
            torch._foreach_add_(total, c)
            if "norms" in self.names:
                norms.append(torch.stack([part.square().sum() for part in c]).sum())
            if self.names != ("norms",):
                torch._foreach_addcmul_(squares, c, c)
        for p, gradient in zip(weights, total, strict=True):
            p.grad = gradient
        self.squares = dict(zip(parameters, squares, strict=True))
        self.squared_norms = torch.stack(norms) if norms else None


class Microbatches(Stepper):
    """Gradients of micro-batches of b examples, and their squares: with h_i the mean gradient of micro-batch i,

    s2 = (mean_i h_i^2 - m^2)/(1/b - 1/B)        q = m^2 + s2 (B - 1)/B
    """

    def __init__(self, problem: Problem, parts: int) -> None:
        super().__init__(problem)
        self.parts = min(parts, self.batch_size)
        self.squares: list[Tensor] = []

    def step(self) -> None:
        weights = list(self.problem.parameters().values())
        rows = self.batch_size // self.parts
        total = [torch.zeros_like(p) for p in weights]
        self.squares = [torch.zeros_like(p) for p in weights]
        for x, y in zip(self.problem.x.split(rows), self.problem.y.split(rows), strict=True):
            c = torch.autograd.grad(self.problem.losses_of(self.forward, x, y).mean() / self.parts, weights)
            torch._foreach_add_(total, c)
            torch._foreach_addcmul_(self.squares, c, c)
        for p, gradient in zip(weights, total, strict=True):
            p.grad = gradient

    def clear(self) -> None:
        super().clear()
        self.squares = []

    def statistics(self) -> Found:
        n, b = self.batch_size, self.batch_size / self.parts
        found = {}
        for (name, m), squares in zip(self.gradients().items(), self.squares, strict=True):
            variance = (self.parts * squares - m.square()) / (1 / b - 1 / n)
            found[name] = m.square() + variance * ((n - 1) / n)
        return {"second_moment": found}


class Func(Summed):
    """torch.func.vmap(grad), `rows` examples at a time (None: all). Attention by its formula, which vmap can."""

    def __init__(self, problem: Problem, rows: int | None = None) -> None:
        super().__init__(problem, "second_moment")
        self.rows = rows or self.batch_size
        self.means: dict[str, Tensor] = {}
        self.per_example = torch.func.vmap(torch.func.grad(self.loss_of_one), in_dims=(None, 0, 0))

    def loss_of_one(self, parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        forward = partial(torch.func.functional_call, self.problem.model, parameters)
        losses = self.problem.losses_of(forward, x.unsqueeze(0), y.unsqueeze(0))
        return losses.sum() / self.batch_size

    def step(self) -> None:
        parameters = {name: p.detach() for name, p in self.problem.parameters().items()}
        for x, y in zip(self.problem.x.split(self.rows), self.problem.y.split(self.rows), strict=True):
            with sdpa_kernel(SDPBackend.MATH):
                c = self.per_example(parameters, x, y)
            for name in parameters:
                self.add(self.means, name, c[name].sum(dim=0))
                self.add(self.squares, name, squares(c.pop(name)))

    @staticmethod
    def add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
        sums[name] = sums[name].add_(value) if name in sums else value

    def gradients(self) -> dict[str, Tensor]:
        return self.means

    def clear(self) -> None:
        super().clear()
        self.means = {}


class Opacus(Summed):
    """GradSampleModule: p.grad_sample (B, *shape), by hooks with a formula per layer or by torch.func."""

    def __init__(self, problem: Problem, name: str, functorch: bool = False) -> None:
        from opacus.grad_sample import GradSampleModule

        super().__init__(problem, name)
        self.forward = GradSampleModule(problem.model, loss_reduction="sum", force_functorch=functorch)

    def step(self) -> None:
        self.losses().mean().backward()
        samples = {name: p.grad_sample for name, p in self.problem.parameters().items()}  # type: ignore[attr-defined]
        if self.names == ("norms",):
            self.squared_norms = torch.stack([squared_norms(c) for c in samples.values()]).sum(dim=0)
        else:
            self.squares = {name: squares(c) for name, c in samples.items()}

    def clear(self) -> None:
        super().clear()
        for p in self.problem.model.parameters():
            p.grad_sample = None  # type: ignore[attr-defined]


class Ghost(Summed):
    """Opacus' ghost clipping up to the norms; clipping would take another backward pass."""

    def __init__(self, problem: Problem) -> None:
        from opacus.grad_sample import GradSampleModuleFastGradientClipping

        super().__init__(problem, "norms")
        self.forward = GradSampleModuleFastGradientClipping(problem.model, loss_reduction="sum")

    def step(self) -> None:
        self.losses().mean().backward()
        self.squared_norms = self.forward.get_norm_sample().square()  # type: ignore[attr-defined]


class BackPACK(Summed):
    """An extension of the backward pass, which leaves its quantity at the parameters."""

    def __init__(self, problem: Problem, name: str) -> None:
        from backpack import backpack, extend
        from backpack.extensions import BatchL2Grad, SumGradSquared, Variance

        super().__init__(problem, name)
        self.forward = extend(problem.model)
        self.context = backpack
        self.extension, self.attribute = {
            "second_moment": (SumGradSquared, "sum_grad_squared"),
            "variance": (Variance, "variance"),
            "norms": (BatchL2Grad, "batch_l2"),
        }[name]

    def step(self) -> None:
        with self.context(self.extension()):
            self.losses().mean().backward()
        found: dict[str, Any] = {}
        for name, p in self.problem.parameters().items():
            if not hasattr(p, self.attribute):
                layer = self.problem.model.get_submodule(name.rpartition(".")[0])
                raise ValueError(f"no {self.extension.__name__} of {type(layer).__name__}")
            found[name] = getattr(p, self.attribute)
        if self.names == ("norms",):
            self.squared_norms = torch.stack(list(found.values())).sum(dim=0)
        else:
            self.squares = found

    def statistics(self) -> Found:
        if self.names != ("variance",):
            return super().statistics()
        n = self.batch_size  # BackPACK's are mean_b c_b^2 - (mean_b c_b)^2
        return {"variance": {name: v * (n**3 / (n - 1)) for name, v in self.squares.items()}}

    def clear(self) -> None:
        super().clear()
        for p in self.problem.model.parameters():
            if hasattr(p, self.attribute):
                delattr(p, self.attribute)
