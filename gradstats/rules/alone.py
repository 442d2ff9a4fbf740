"""Does a module do for an example alone, or in a loop over examples, what it does for it in the batch?"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from gradstats.errors import CoverageError
from gradstats.layout import Layout
from gradstats.rules.fallback import OverExamples, run
from gradstats.rules.registry import refuse


class Constants(TorchFunctionMode):
    """Constants for random numbers, so that two forwards that draw different ones can be compared."""

    DRAWN = frozenset({"rand", "randn", "rand_like", "randn_like", "normal", "bernoulli", "poisson"})
    IN_PLACE = frozenset({"normal_", "uniform_", "bernoulli_", "exponential_", "log_normal_", "cauchy_", "geometric_"})

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if "dropout" in name:
            return args[0] if args else kwargs["input"]
        if name in self.IN_PLACE:
            return args[0].fill_(0.5)
        result = func(*args, **kwargs)
        return torch.full_like(result, 0.5) if name in self.DRAWN else result


def compare(
    call: OverExamples, layouts: Sequence[Layout | None], n: int, loops: bool = False, gradient: bool = True
) -> bool:
    """Refuses a module whose output for an example, or its gradient, changes when it sees the example alone.

    What mixes rows, divides by the size of the batch, or shares an argument that happens to have as many rows as the
    batch has examples shows here, and so do wrong batching rules of torch. A module that draws random numbers in
    training is compared in evaluation mode, and with constants for random numbers where that does not help. Returns
    whether it draws any.
    """
    module = call.module
    training = {child: child.training for child in module.modules()}
    devices = {p.device for p in module.parameters() if p.is_cuda}
    leaves = {name: p.detach().requires_grad_(p.requires_grad) for name, p in module.named_parameters()}
    buffers = dict(module.named_buffers())

    def plain(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        return tensors_in(call.plain(leaves | {name: buffer.clone() for name, buffer in buffers.items()}))

    def alone() -> list[Tensor]:
        expanded = {name: p.expand(n, *p.shape) for name, p in leaves.items()}
        return tensors_in(tree_leaves(run(call, layouts, expanded, n, loops)))

    try:
        with torch.random.fork_rng(devices=list(devices)), torch.enable_grad():
            whole = plain(0)
            constants: AbstractContextManager = nullcontext()
            random = not same(whole, plain(1))
            if random:
                module.eval()
                whole = plain(0)
                if not same(whole, plain(1)):
                    constants = Constants()
                    with constants:
                        whole = plain(0)
            with constants:
                found = alone()
            if not close(whole, found):
                raise differs(module, "its output")
            if gradient and not close(*gradients(whole, found, leaves), together=True):
                raise differs(module, "the gradient of its output")
    finally:
        for child, mode in training.items():
            child.training = mode
    return random


def gradients(whole: list[Tensor], found: list[Tensor], leaves: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Of a sum of the outputs, weighted entry by entry, once for either way to compute them."""
    wanted = [p for p in leaves.values() if p.requires_grad]
    results: list[list[Tensor]] = []
    for outputs in (whole, found):
        reached = [(o, a) for o, a in zip(outputs, whole, strict=True) if o.requires_grad and a.dim()]
        if not reached or not wanted:
            return [], []
        # Where all examples share one entry in the one way, they have one each in the other: a share of its weight.
        weights = [
            torch.arange(a.numel(), device=o.device).cos().reshape(a.shape).expand_as(o).to(o) * len(a) / len(o)
            for o, a in reached
        ]
        try:
            given = torch.autograd.grad([o for o, _ in reached], wanted, weights, allow_unused=True)
        except RuntimeError as error:
            if "use_reentrant" in str(error):  # which torch.autograd.grad cannot differentiate
                return [], []
            raise
        results.append([torch.zeros_like(p) if g is None else g for g, p in zip(given, wanted, strict=True)])
    return results[0], results[1]


def check_loop(call: OverExamples, output: Any) -> None:
    """Refuses a loop over examples that does something else than the module with all of them: control flow on the
    batch."""
    whole = [o.detach() for o in tensors_in(call.plain({}))]
    if not close(whole, [o.detach() for o in tensors_in(tree_leaves(output))]):
        raise differs(call.module, "its output")


def close(whole: list[Tensor], found: list[Tensor], together: bool = False) -> bool:
    """Whether tensors agree, each of their rows on its own scale or on a thousandth of the tensor's; `together`: each
    tensor on its own scale or on a thousandth of that of the largest."""
    whole, found = [a.detach() for a in whole], [b.detach() for b in found]
    largest = max((float(a.abs().max()) for a in whole if a.numel()), default=0.0) if together else 0.0
    for a, b in zip(whole, found, strict=True):
        # Far above the rounding of another order of summation, far below any coupling of consequence.
        tolerance = {torch.float64: 1e-6, torch.float32: 1e-3}.get(a.dtype, 5e-2)
        if torch.is_autocast_enabled(a.device.type):
            tolerance = 5e-2
        if not a.is_floating_point():
            a, b = a.double(), b.double()
        if a.shape[:1] == (1,) and a.shape[1:] == b.shape[1:]:
            a = a.expand_as(b)  # shared by all examples, and repeated for each
        if a.shape != b.shape:
            return False
        if a.numel() == 0:
            continue
        size = a.abs()
        own = size.amax(tuple(range(1, a.dim())), keepdim=True) if a.dim() > 1 and not together else size.max()
        if bool(((a - b).abs() > tolerance * (1e-6 + 1e-3 * max(largest, float(size.max())) + own)).any()):
            return False
    return True


def differs(module: nn.Module, what: str) -> CoverageError:
    return refuse(
        module,
        f"{what} for an example depends on the other examples of the batch, or on how many there are",
        "Keep what mixes examples outside of the attached module",
    )


def tensors_in(values: Sequence[Any]) -> list[Tensor]:
    return [v for v in values if isinstance(v, Tensor)]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))
