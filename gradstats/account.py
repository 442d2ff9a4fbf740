"""One parameter's account: its shadows, and the agreement between its gradient and its statistics.

The gradient that reaches a parameter must be what its leaf returned, and p.grad what the last backward pass left: any
difference is gradient that the statistics have not seen, and is refused rather than ignored.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gradstats.contribution import accumulation_dtype
from gradstats.errors import CoverageError, LifetimeError
from gradstats.statistics import SUMS

if TYPE_CHECKING:
    from gradstats.engines.fused import FusedHandle


def shadow(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Zeros of the given shape without memory, a leaf of autograd."""
    zero = torch.zeros((), dtype=accumulation_dtype(like.dtype), device=like.device)
    return zero.expand(shape).requires_grad_()


class Account:
    """Of the parameter `attribute` of `module`, called `name` in the model."""

    def __init__(self, handle: FusedHandle, module: nn.Module, attribute: str, name: str):
        self.handle, self.holder, self.attribute, self.name = handle, module._parameters, attribute, name
        self._forget()

    def _forget(self) -> None:
        self.shadows: dict[str, Tensor] = {}  # by sum, those shaped like the parameter
        self.example_shadows: dict[str, list[tuple[int, Tensor]]] = {}  # (generation, shadow) of every use
        self.generations: set[int] = set()  # backpropagated in this window
        self.first = 0  # the first generation that counts
        self.backward_pass = -1
        self.unseen = False  # p.grad holds gradient that the statistics do not
        self._subject: Tensor | None = None  # the parameter that the hooks are on
        self._hooks: list[Any] = []
        self._returned: list[tuple[Tensor, int]] = []  # gradients in the backward under way, with their versions
        self._left: tuple[int, int] | None = None  # address and version of p.grad when it was last accumulated
        self._explained = False  # the gradient that arrived last was the leaf's
        self._cast_seen = False

    def __getstate__(self) -> dict[str, Any]:
        """A copy of an attached model has seen nothing yet."""
        return {key: getattr(self, key) for key in ("handle", "holder", "attribute", "name")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    @property
    def parameter(self) -> nn.Parameter:
        return self.holder[self.attribute]  # type: ignore[return-value]

    @property
    def present(self) -> bool:
        return self.holder.get(self.attribute) is not None

    @property
    def trainable(self) -> bool:
        p = self.holder.get(self.attribute)
        return p is not None and p.requires_grad

    # Forward

    def shadow_of(self, kind: str, n: int) -> Tensor:
        """The shadow of one sum, for a use by n examples."""
        p = self.parameter
        if self._subject is not p:
            self._follow(p)
        if SUMS[kind] == "example":
            return shadow((n,), p)
        found = self.shadows.get(kind)
        if (
            found is None
            or (found.shape, found.device) != (p.shape, p.device)
            or found.dtype != accumulation_dtype(p.dtype)
        ):
            found = self.shadows[kind] = shadow(tuple(p.shape), p)
        return found

    def _follow(self, p: nn.Parameter) -> None:
        """Hooks the parameter; it may have been replaced since the last use."""
        self.close()
        self._subject = p
        # Weak, since Python's collector does not see through this kind of hook: the model would never be freed.
        accumulated = weakref.WeakMethod(self._accumulated)
        self._hooks = [
            p.register_hook(self._arrives),
            p.register_post_accumulate_grad_hook(lambda p: (alive := accumulated()) and alive(p)),
        ]
        self.handle.register(p, self.name)

    # Backward

    def record(self, generation: int, gradient: Tensor, shadows: dict[str, Tensor]) -> None:
        """Called by the leaf's backward with what it returns, before anything is accumulated."""
        for kind, s in shadows.items():
            if SUMS[kind] == "example":
                self.example_shadows.setdefault(kind, []).append((generation, s))
        # An alias: shares storage, so that autograd cannot add another use's gradient to it in place unseen.
        self._returned.append((gradient.detach(), gradient._version))

    def begin_pass(self) -> None:
        self._returned.clear()

    def _arrives(self, incoming: Tensor) -> None:
        """Compares the gradient that reaches the parameter in this pass with what the leaf returned."""
        returned, self._returned = self._returned, []
        self._explained = bool(returned)
        if not returned:
            if bool(incoming.any()):
                self.handle.lifetime.suspect(self, self._outside(incoming))
            return
        gradient, version = returned[0]
        if len(returned) == 1 and gradient.data_ptr() == incoming.data_ptr() and version == incoming._version:
            return
        cast = gradient.dtype != incoming.dtype
        if cast and self._cast_seen and incoming.is_cuda:  # comparing values waits for the device: once is enough
            return
        parts = torch.stack([g.to(incoming.dtype) for g, _ in returned])
        # One gradient must arrive as it was returned; several may have been added in another order.
        slack = 4 * torch.finfo(incoming.dtype).eps * parts.abs().sum(0) if len(returned) > 1 else 0
        if bool(((parts.sum(0) - incoming).abs() > slack).any()):
            raise self._outside(incoming)
        self._cast_seen = cast

    def _accumulated(self, p: Tensor) -> None:
        if p.grad is not None and self._explained:
            self._left = (p.grad.data_ptr(), p.grad._version)

    def _outside(self, incoming: Tensor) -> CoverageError:
        return CoverageError(
            f"parameter '{self.name}' {tuple(incoming.shape)} receives gradient from outside of its layer (a "
            f"functional use of the weight, a penalty added to the loss, or a hook that changes the gradient), so its "
            f"per-example statistics would be incomplete. Use the layer only by calling it, apply penalties in the "
            f"optimizer (weight_decay), or attach(model, engine='vmap')."
        )

    # Window

    @property
    def untouched(self) -> bool:
        """Whether p.grad is as the last backward pass left it."""
        grad = self.parameter.grad
        return grad is not None and self._left == (grad.data_ptr(), grad._version)

    @property
    def fresh(self) -> bool:
        """Whether the next gradient is the first since zero_grad(), whichever way it zeroed."""
        grad = self.parameter.grad
        return grad is None or (not self.untouched and not bool(grad.any()))

    def begin_use(self, backward_pass: int, first_open: int) -> None:
        """The first use of the parameter in a backward pass: does its p.grad go with its statistics?"""
        if self.backward_pass == backward_pass:
            return
        self.backward_pass = backward_pass
        if self.fresh:
            if self.generations:  # zeroed while other parameters' gradients were kept
                self.reset(first_open)
        elif not (self.generations and self.untouched):
            self.unseen = True

    def reset(self, first: int) -> None:
        """Forgets the sums; generations from `first` on count."""
        for s in self.shadows.values():
            s.grad = None
        self.example_shadows.clear()
        self.generations.clear()
        self.first = first
        self.unseen = False

    # Reading

    @property
    def batch_size(self) -> int:
        return sum(size for generation, size in self.handle.lifetime.sizes.items() if generation >= self.first)

    def value(self, kind: str) -> Tensor | None:
        """A raw sum over the window, or None if nothing was backpropagated. Raises: LifetimeError."""
        if self.unseen:
            raise LifetimeError(
                f"the gradient of '{self.name}' holds more than these statistics have seen: it was changed between two "
                f"backward passes, or is older than attach. Call zero_grad() before the first backward pass, clip with "
                f"the optimizer's max_norm, and apply penalties in the optimizer."
            )
        if SUMS[kind] == "parameter":
            s = self.shadows.get(kind)
            return None if s is None else s.grad
        uses = {generation: s.grad for generation, s in self.example_shadows.get(kind, []) if s.grad is not None}
        if not uses:
            return None
        # In the order of the forwards. Examples that did not pass through this layer contribute nothing to it.
        sizes = self.handle.lifetime.sizes
        zeros = next(iter(uses.values())).new_zeros
        return torch.cat([uses[g] if g in uses else zeros(sizes[g]) for g in sorted(sizes) if g >= self.first])

    def close(self) -> None:
        """Takes the hooks off the parameter."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._subject = [], None
