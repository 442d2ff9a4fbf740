"""One parameter's account: its shadows, and the agreement between its gradient and its statistics.

The gradient that reaches a parameter must be what its leaf returned, and p.grad what the last backward pass left: any
difference is gradient that the statistics have not seen, and is refused rather than ignored.
"""

from __future__ import annotations

import sys
import weakref
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

from gradstats.distributed.totals import Totals, unshared
from gradstats.errors import CoverageError, LifetimeError, MissingStatistic
from gradstats.gradient import Left, fresh, same_sample, sample, untouched
from gradstats.sums import SUMS, RawSum

if TYPE_CHECKING:
    from gradstats.engines.fused import FusedHandle


def shadow(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, device: Any = None) -> Tensor:
    """Zeros of the given shape without memory, a leaf of autograd."""
    return torch.zeros((), dtype=dtype, device=device).expand(shape).requires_grad_()


def fits(found: Tensor | None, p: Tensor, raw: RawSum) -> TypeGuard[Tensor]:
    """Whether a shadow is as the parameter is now."""
    if found is None:
        return False
    return found.shape == p.shape and found.device == p.device and found.dtype == raw.dtype(p.dtype)


def references(tensor: Tensor) -> tuple[int, int, int]:
    """To the Python object, to torch's tensor, and to its memory, those of this call included."""
    storage = tensor.untyped_storage()
    tensors, memories = tensor._use_count(), torch._C._storage_Use_Count(storage._cdata)  # type: ignore[attr-defined]
    return sys.getrefcount(tensor), tensors, memories


def of_one_name() -> tuple[int, int, int]:
    tensor = torch.empty(1)
    return references(tensor)


ALONE = of_one_name()  # interpreters, and versions of torch, count differently


class Account:
    """Of the parameter `attribute` of `module`, called `name` in the model."""

    def __init__(self, handle: FusedHandle, module: nn.Module, attribute: str, name: str):
        self.handle, self.holder, self.attribute, self.name = handle, module._parameters, attribute, name
        self.uses: int | None = None  # in one forward, as the probe found
        self.shadows: dict[str, Tensor] = {}  # by sum, those shaped like the parameter
        self._forget()

    def _forget(self) -> None:
        self.steps: dict[str, dict[int, Tensor]] = {}  # other sums, by generation
        self._memory: dict[str, Tensor] = {}  # sums of a window before
        self._recycled: set[str] = set()  # those whose memory is written over in the next one
        self.generations: set[int] = set()  # backpropagated in this window
        self.units: dict[int, int] = {}  # what was squared in each of them: examples, or positions, or groups
        self.first = 0  # the first generation that counts
        self.backward_pass = -1
        self.unseen = False  # p.grad holds gradient that the statistics do not
        self.subject: Tensor | None = None  # the parameter that the hooks are on
        self._hooks: list[Any] = []
        self.returned: list[tuple[Tensor, int]] = []  # gradients in the backward under way, with their versions
        self.left: Left | None = None  # p.grad when it was last accumulated
        self.totals: Totals | None = None  # over all ranks
        self.elsewhere = 0  # examples of other ranks, or of what else is counted, that are in them
        self.told = 0  # the first generation that other ranks have not been told of
        self._explained = False  # the gradient that arrived last was the leaf's
        self._cast_seen = False

    def __getstate__(self) -> dict[str, Any]:
        """A copy of an attached model has seen nothing yet."""
        state = {key: getattr(self, key) for key in ("handle", "holder", "attribute", "name", "uses")}
        return state | {"shadows": {kind: s.detach().requires_grad_() for kind, s in self.shadows.items()}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    @property
    def tensor(self) -> nn.Parameter:
        """What the layer computes with."""
        return self.holder[self.attribute]  # type: ignore[return-value]

    @property
    def parameter(self) -> nn.Parameter:
        """What has the gradient, and is the optimizer's."""
        return self.tensor

    @property
    def current(self) -> nn.Parameter | None:
        """The same; None where the module has no such parameter any more."""
        return self.held  # type: ignore[return-value]

    @property
    def held(self) -> Tensor | None:
        """What the module has under that name: parametrizing takes it away, and torch.func puts other tensors there."""
        return self.holder.get(self.attribute)

    @property
    def present(self) -> bool:
        """Whether the module still has the parameter."""
        return self.held is not None

    @property
    def trainable(self) -> bool:
        """Whether the parameter is there, and has a gradient to come."""
        p = self.holder.get(self.attribute)
        return p is not None and p.requires_grad

    # Forward

    def shadow_of(self, kind: str) -> Tensor:
        """The shadow of a sum shaped like the parameter."""
        found, p = self.shadows.get(kind), self.tensor
        if not fits(found, p, SUMS[kind]):
            found = self.shadows[kind] = shadow(tuple(p.shape), SUMS[kind].dtype(p.dtype), p.device)
        return found

    def ready_shadow_of(self, kind: str) -> Tensor:
        """The same while Dynamo traces, when it is too late to make one: `attach` does, and .to()."""
        found, p = self.shadows.get(kind), self.tensor
        if not fits(found, p, SUMS[kind]):
            raise CoverageError(
                f"parameter '{self.name}' {tuple(p.shape)} was replaced by one of another shape or dtype since attach: "
                f"detach(), and attach the model again before torch.compile"
            )
        return found

    def follow(self) -> None:
        """Hooks the parameter: it may have been replaced since the last use, or hooked by others after us."""
        p = self.tensor
        if self.subject is not p or next(reversed(p._backward_hooks)) != self._hooks[0].id:  # type: ignore[arg-type]
            self._follow(p)

    def follow_plainly(self) -> None:
        """The same where the gradient is compared with nothing, so that other hooks may change it after ours."""
        p = self.holder.get(self.attribute)
        if p is not self.subject and p is not None and p.requires_grad:
            self._follow(p)

    def _follow(self, p: nn.Parameter) -> None:
        if self.subject is not None:
            self.handle.check_sharding()
        self.close()
        self.subject = p
        # Weak, since Python's collector does not see through this kind of hook: the model would never be freed.
        own = weakref.ref(self)

        def accumulated(p: Tensor) -> None:
            if (account := own()) is not None:
                account._accumulated(p)

        self._hooks = [
            p.register_hook(self._arrives),
            p.register_post_accumulate_grad_hook(accumulated),
        ]
        # Before the user's own, one of which may take an optimizer's step and the gradient away. They run in the order
        # of insertion, whatever move_to_end says.
        hooks = p._post_accumulate_grad_hooks
        others = [(key, hook) for key, hook in hooks.items() if key != self._hooks[1].id]
        for key, hook in others:
            del hooks[key]
            hooks[key] = hook
        self.handle.register(self.parameter, self.name)

    # Backward

    def record(self, generation: int, gradient: Tensor | None, units: int, sums: dict[str, Tensor]) -> None:
        """Called by the leaf's backward with what it returns, before anything is accumulated; and with the sums that
        autograd would not accumulate as they ought to be."""
        if units:
            self.units[generation] = units
        for kind, value in sums.items():
            steps, raw = self.steps.setdefault(kind, {}), SUMS[kind]
            if raw.per == "element" and steps:  # one tensor shaped like the parameter is enough
                steps[next(iter(steps))] = raw.merge(next(iter(steps.values())), value)
            else:
                steps[generation] = value
        if gradient is not None:
            # An alias: shares storage, so that autograd cannot add another use's gradient to it in place unseen.
            self.returned.append((gradient.detach(), gradient._version))

    def _arrives(self, incoming: Tensor | None) -> None:
        """Compares the gradient that reaches the parameter in this pass with what the leaf returned."""
        if incoming is None:  # the layer was reached, and the loss does not depend on it
            return
        returned, self.returned = self.returned, []
        plainly = self.handle.lifetime.arrives(self)
        self._explained = bool(returned) or plainly
        if plainly:
            return
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
            self.left = self.handle.note(p.grad)
            exchange = self.handle.exchange
            if exchange is not None and exchange.views and len(p._post_accumulate_grad_hooks) > 1:
                self.left.sample = sample(p.grad)  # what the user's hooks change is noticed in `note_again`

    def note_again(self) -> None:
        """As `Handle.note_again`, unless something else than what leaves return has changed the gradient."""
        grad = self.parameter.grad if self.present else None
        looked_at = self.generations and not self.unseen  # then
        if grad is None or self.left is None or not self._explained or not looked_at:
            return
        if self.left.sample is None or same_sample(grad, self.left.sample):
            self.left = self.handle.note(grad)

    def _outside(self, incoming: Tensor) -> CoverageError:
        return CoverageError(
            f"parameter '{self.name}' {tuple(incoming.shape)} receives gradient from outside of its layer (a "
            f"functional use of the weight, a penalty added to the loss, or a hook that changes the gradient), so its "
            f"per-example statistics would be incomplete. Use the weight inside of the attached module's forward only, "
            f"apply penalties in the optimizer (weight_decay), or ignore=['{self.name}']."
        )

    # Window

    @property
    def untouched(self) -> bool:
        """Whether p.grad is as the last backward pass left it."""
        return untouched(self.parameter.grad, self.left)

    @property
    def fresh(self) -> bool:
        """Whether the next gradient is the first since zero_grad(), whichever way it zeroed."""
        gradient = self.holder[self.attribute].grad  # type: ignore[union-attr]
        return gradient is None or fresh(gradient, untouched(gradient, self.left))

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

    def reset(self, first: int, keeps: bool = False) -> None:
        """Forgets the sums; generations from `first` on count. What `keeps` their memory until the next reset but this
        one finds it where it was, and not taken back by the system, which gives it again page by page."""
        for kind, s in self.shadows.items():
            if s.grad is not None and s.grad.device.type == "cpu" and (keeps or kind in self._recycled):
                self._memory[kind] = s.grad
            s.grad = None
        if not keeps and self._memory:
            self._memory = {kind: self._memory[kind] for kind in self._recycled & self._memory.keys()}
        self.steps.clear()
        self.generations.clear()
        self.units.clear()
        self.first = first
        self.unseen = False
        self.totals, self.elsewhere = None, 0

    def spare(self, kind: str) -> Tensor | None:
        """The memory of a sum of the window before, if nobody else has it; from now on it is kept for who asks here."""
        self._recycled.add(kind)
        memory = self._memory.pop(kind, None)
        if not fits(memory, self.tensor, SUMS[kind]) or references(memory) != ALONE:
            return None
        return None if memory.is_shared() else memory  # another process's references do not count here

    # Reading

    @property
    def batch_size(self) -> int:
        """Examples in this window, or what else is counted as one."""
        sizes = self._counts
        counted = sizes.values() if self.first == 0 else self._sizes(self.first).values()  # mostly there is no sorting
        return sum(counted) + self.elsewhere

    @property
    def unsent_count(self) -> int:
        """Those of this process that other ranks have not been told of."""
        return sum(self._sizes(max(self.first, self.told)).values())

    @property
    def _counts(self) -> dict[int, int]:
        """What is counted as one, by generation."""
        return self.handle.lifetime.counts if self.handle.granularity == "example" else self.units

    def _sizes(self, first: int) -> dict[int, int]:
        """By generation from `first` on, in order."""
        sizes = self._counts
        return {generation: sizes[generation] for generation in sorted(sizes) if generation >= first}

    @property
    def gathered(self) -> bool:
        """Whether all that was backpropagated in this window was gathered."""
        return bool(self.generations) and self.handle.lifetime.plain.isdisjoint(self.generations)

    def check(self) -> None:
        """Raises: MissingStatistic if nothing was backpropagated through the parameter in this window; LifetimeError if
        its gradient holds more than that."""
        if not self.generations:
            raise MissingStatistic(
                f"parameter '{self.name}' has no statistics: no backward pass has reached it since they were last "
                f"zeroed. Call loss.backward() on the attached model first (torch.autograd.grad leaves none)."
            )
        if self.unseen:
            raise LifetimeError(
                f"the gradient of '{self.name}' holds more than these statistics have seen: it was changed between two "
                f"backward passes, or is older than attach. Call zero_grad() before the first backward pass, clip with "
                f"the optimizer's max_norm, and apply penalties in the optimizer."
            )
        if self.totals is not None and any(generation >= self.told for generation in self.generations):
            raise unshared(self.name, self.totals.ranks)

    def value(self, kind: str) -> Tensor | None:
        """A raw sum over the window, or None if there is none."""
        return self.unsent(kind) if self.totals is None else self.totals.sums.get(kind)

    def unsent(self, kind: str) -> Tensor | None:
        """The same over what other ranks have not been told of: of one process, all."""
        steps, s = self.steps.get(kind), self.shadows.get(kind)
        accumulated = None if s is None else s.grad
        if not steps:
            return accumulated
        found = SUMS[kind].accumulate(steps, self._sizes(max(self.first, self.told)))
        return found if accumulated is None else SUMS[kind].merge(accumulated, found)

    def receive(self, ranks: int, elsewhere: int, found: dict[str, Tensor], generation: int) -> None:
        """p.grad is the average of all ranks, and these are the sums over all of them of what was not told before, up
        to a generation: that of a backward pass which need not have reached the parameter on this rank."""
        for s in self.shadows.values():
            s.grad = None
        self.steps.clear()
        if self.subject is None:  # not used on this rank yet, whose optimizer moves it nevertheless
            self.handle.register(self.parameter, self.name)
        begins = not self.generations
        self.generations.add(generation)
        self.told = generation + 1
        self.elsewhere += elsewhere
        if self.totals is None:
            self.totals = Totals(ranks)
        self.totals.add(found)
        self.left = self.handle.note_average(self.parameter, begins)

    def close(self) -> None:
        """Takes the hooks off the parameter."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self.subject = [], None
