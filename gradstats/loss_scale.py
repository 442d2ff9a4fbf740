"""What torch.amp.GradScaler multiplied the loss by: gradients carry the scale once, their squares twice.

It is noted when a gradient is accumulated, since scaler.update() changes it. p.grad may lose it again: scaler.unscale_
and scaler.step divide in place and leave no mark on the tensor, so the largest entry of p.grad is noted too, and tells.
"""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from gradstats.errors import LifetimeError
from gradstats.gradient import State, fresh, state_of


@dataclass
class Note:
    """Of one parameter, since its gradient was last None. Tensors, so that no hook waits for the device."""

    scale: Tensor  # in the first backward pass
    same: Tensor  # whether it was so in all others
    whole: Tensor  # whether p.grad still carried it whenever more was added
    largest: Tensor  # max |p.grad| after the last backward pass
    left: State  # of p.grad then


class LossScale:
    """Follows one scaler, parameter by parameter."""

    def __init__(self, scaler: Any):
        self.scaler = scaler
        self._notes = WeakIdKeyDictionary()
        self._arrived = WeakIdKeyDictionary()  # in the backward pass under way: whether p.grad still carries the scale
        self._hooks: list[Any] = []
        self._task = -1
        self._scales: dict[torch.device, Tensor] = {}  # in this graph task

    def __reduce__(self) -> tuple[Any, ...]:
        return LossScale, (self.scaler,)

    def __deepcopy__(self, memo: dict[int, Any]) -> LossScale:
        """A copied model is trained with the same scaler."""
        return LossScale(self.scaler)

    def follow(self, parameter: Tensor) -> None:
        """Hooks a trainable parameter, once."""
        if parameter in self._notes:
            return
        self._notes[parameter] = None
        # Weak, since Python's collector does not see through this kind of hook.
        accumulated = weakref.WeakMethod(self._accumulated)
        self._hooks += [
            parameter.register_hook(lambda gradient: self._arrives(parameter)),
            parameter.register_post_accumulate_grad_hook(lambda p: (alive := accumulated()) and alive(p)),
        ]

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def _arrives(self, p: Tensor) -> None:
        note = self._notes[p]
        if note is None or p.grad is None or fresh(p.grad, note.left == state_of(p.grad)):
            self._arrived[p] = None
        else:
            self._arrived[p] = torch.isclose(largest(p.grad), note.largest, rtol=0, atol=0, equal_nan=True)

    @torch.no_grad()
    def _accumulated(self, p: Tensor) -> None:
        if p.grad is None or p not in self._arrived:
            return
        note, whole = self._notes[p], self._arrived.pop(p)
        if whole is None:
            self._notes[p] = self._noted(p, p.grad)
        else:
            note.same, note.whole = note.same & (note.scale == self._now(p.device)), note.whole & whole
            note.largest, note.left = largest(p.grad), state_of(p.grad)

    @torch.no_grad()
    def averaged(self, p: Tensor, gradient: Tensor, begins: bool) -> None:
        """Ranks have averaged p.grad since it was accumulated, which need not have been on this one: then the window
        `begins` with it."""
        note = self._notes.get(p)
        if note is None or begins:
            self._notes[p] = self._noted(p, gradient)
        else:
            note.largest, note.left = largest(gradient), state_of(gradient)

    def _noted(self, p: Tensor, gradient: Tensor) -> Note:
        true = torch.ones((), dtype=torch.bool, device=p.device)
        return Note(self._now(p.device), true, true, largest(gradient), state_of(gradient))

    def _now(self, device: torch.device) -> Tensor:
        task = torch._C._current_graph_task_id()
        if task != self._task:
            self._task, self._scales = task, {}
        if device not in self._scales:
            self._scales[device] = self.scaler.scale(torch.ones((), device=device))
        return self._scales[device]

    def of_squares(self, name: str, parameter: Tensor) -> float:
        """By what the loss was multiplied. Raises: LifetimeError if it changed in between."""
        note = self._notes.get(parameter)
        if note is None:
            raise LifetimeError(
                f"the loss scale behind the statistics of '{name}' is not known, since a hook took its gradient away "
                f"while the backward pass ran. Leave p.grad alone until it is over"
            )
        if not bool(note.same):
            raise LifetimeError(
                f"the gradient of '{name}' adds up backward passes whose losses had different scales. Call "
                f"scaler.update() after the last of them only, and zero_grad() before the next"
            )
        return float(note.scale)

    def of_gradient(self, name: str, parameter: Tensor, factor: float = 1.0) -> float:
        """What p.grad is still multiplied by: 1 once it was unscaled, by something beside `factor`.

        Raises: LifetimeError if it is neither.
        """
        scale, note, gradient = self.of_squares(name, parameter), self._notes[parameter], parameter.grad
        assert gradient is not None
        before, now = float(note.largest) * factor, float(largest(gradient))
        if not bool(note.whole):
            raise LifetimeError(
                f"the gradient of '{name}' was unscaled before another backward pass added to it. Call zero_grad() "
                f"after scaler.step(optimizer)"
            )
        slack = 4 * torch.finfo(gradient.dtype).eps
        if before == 0 or not math.isfinite(before) or math.isclose(now, before, rel_tol=slack):
            return scale
        if math.isclose(now * scale, before, rel_tol=slack):
            return 1.0
        raise LifetimeError(
            f"the gradient of '{name}' was changed after the backward pass by something other than grad_scaler, so it "
            f"no longer fits the squares. Read this statistic before, and clip with the optimizer's max_norm, with "
            f"stats.clip_grad_norm_(max_norm) after scaler.unscale_, or attach(..., follow_clipping=True)"
        )

    def divided(self, name: str, parameter: Tensor, factor: float) -> float:
        """By what p.grad was unscaled since it was multiplied by `factor`; 1 if that included it.

        Raises: LifetimeError if it was not unscaled.
        """
        scale = self.of_squares(name, parameter)
        if self.of_gradient(name, parameter, factor) == 1:
            return scale
        if includes(factor, scale):
            return 1.0
        if 0 < float(self._notes[parameter].largest) < math.inf:
            raise LifetimeError(
                f"the gradient of '{name}' still carries the loss scale {scale:g}: call scaler.unscale_(optimizer) "
                f"before its norm is clipped"
            )
        return scale


def includes(factor: float, scale: float) -> bool:
    """Whether a gradient that was multiplied by `factor` was unscaled by that, as is likely for a very small one."""
    return factor != 1 and factor * scale**0.5 < 1


def largest(gradient: Tensor) -> Tensor:
    """max |gradient|, exact under multiplication by a power of two."""
    if not gradient.numel():
        return gradient.new_zeros(())
    low, high = torch.aminmax(gradient.to_dense())  # fifteen times as fast as the norm of order inf
    return torch.maximum(-low, high)
