"""What all optimizers share: statistics found through the parameters, time counted in examples, the contract of torch.

A step goes one way: gradients and their windows, grouped by what their step has in common -> scalars of each group ->
the optimizer's equation, over all its elements.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradstats.distributed.local import local
from gradstats.errors import GradstatsError
from gradstats.optim.bound import clip_factors
from gradstats.optim.elementwise import WORTH_COMPILING, compiler, run
from gradstats.optim.found import allocate, find, state_of
from gradstats.optim.options import Check, check_options
from gradstats.optim.parts import Age, Part, parts_of
from gradstats.optim.saved import check_saved, restore, with_held
from gradstats.optim.tally import Tally
from gradstats.optim.update import Update
from gradstats.sums import addressable


def check_memory(parameters: Iterable[Tensor]) -> None:
    """Raises: GradstatsError for two parameters in the same memory: a step moves many at once, from where they were, so
    that one's change would be lost."""
    known: dict[int, Tensor] = {}
    for p in parameters:
        t = local(p)
        if not addressable(t) or t.device.type == "meta" or t.numel() == 0:
            continue
        other = known.setdefault(t.data_ptr(), p)
        if other is not p:
            raise GradstatsError(
                f"two parameters, of shapes {tuple(other.shape)} and {tuple(p.shape)}, are views of the same numbers: "
                f"let modules share one parameter (b.weight = a.weight, not nn.Parameter(a.weight.data))"
            )


class ExampleOptimizer(Optimizer):
    """An optimizer that counts time in examples. Subclasses give the equation (`update`) and its scalars.

    Options common to all:
        lr: as tuned at `batch_size`; a float or a tensor ().
        weight_decay: decoupled, p <- p (1 - lr weight_decay)^(B/batch_size), whose effect per example does not depend
            on B; with decoupled_weight_decay=False it is added to every example's gradient, as torch.optim.SGD does.
        batch_size: the batch size at which the values were tuned.
        max_norm: bounds the norm of the running average over all parameters of the optimizer, unlike clipping of the
            batch gradient, which depends on the batch size. None does not clip.
        maximize: ascend instead of descend.
        compiled: one compiled kernel for the whole step, or block by block in plain torch; None takes a kernel that
            is there for the equation, and compiles one from a million elements on, where there is a compiler. `path`
            says which.

    Statistics come from `gradstats.attach(model)`, found through the parameters. What reads none of them needs the
    batch size only, which `step(batch_size=B)` gives for a model that is not attached. The state's "step" counts
    examples, as an integer; the groups' "examples" do for schedules.
    """

    checks: ClassVar[Mapping[str, Check]] = {}  # of options that no other optimizer has: options.py

    def __init__(self, params: Any, options: dict[str, Any], compiled: bool | None = None):
        self.compiled = compiled
        self._schedules: list[Callable[[int], None]] = []  # called with B before every step
        self._chosen: tuple[Any, bool] = None, False  # whether steps are compiled, after what decides it
        self.tallies: dict[int, Tally] = defaultdict(Tally)  # of the kinds of parameters in a step, by their number
        super().__init__(params, options | {"examples": 0})
        if isinstance(self.defaults["lr"], Tensor):  # the first group's is the user's, which changes
            self.defaults["lr"] = self.defaults["lr"].clone()
        self._step_supports_amp_scaling = True

    # What a subclass gives

    def statistics(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        """What the equation may read beyond the mean gradient; names of `update.STATISTICS`."""
        return ()

    @abstractmethod
    def update(self, group: Mapping[str, Any], batch_size: float, state: Mapping[str, Any]) -> Update:
        """The equation for parameters of the group whose state has these entries, in a batch of the given size."""

    @abstractmethod
    def scalars(self, group: Mapping[str, Any], age: Age, update: Update) -> dict[str, Any]:
        """Its numbers."""

    def needs_gradient(self, group: Mapping[str, Any]) -> bool:
        """Whether p.grad must go with the statistics, because their combination is read. Where the mean gradient
        enters linearly, whoever changed it meant to."""
        return False

    def prepare(self, parts: list[Part]) -> None:
        """May add to the scalars what takes all parameters to know."""

    def values_at(self, group: Mapping[str, Any], batch_size: float) -> dict[str, Any]:
        """For `describe`: what a step of B examples has in place of lr B/batch_size and beta^(B/batch_size)."""
        return {}

    # Options

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if isinstance(group["lr"], Tensor) and any(group["lr"] is other["lr"] for other in self.param_groups[:-1]):
            group["lr"] = group["lr"].clone()  # a schedule would change one tensor once for each group
        try:
            self.check(group)
            check_memory([p for group in self.param_groups for p in group["params"]])
        except GradstatsError:
            self.param_groups.pop()
            raise

    def check(self, group: Mapping[str, Any]) -> None:
        """Raises: GradstatsError for options out of range."""
        check_options(type(self), group)

    @property
    def examples(self) -> int:
        """Examples seen so far."""
        return max(group["examples"] for group in self.param_groups)

    @property
    def path(self) -> str:
        """How a step is computed, and why."""
        if self.compiled is not False and all(map(self._is_ready, self.param_groups)):
            return f"native kernel ({compiler('cpu')})"
        return self._form()[1]

    def _form(self) -> tuple[bool, str]:
        """Whether what no kernel is there for is compiled, and why."""
        devices = {p.device.type for group in self.param_groups for p in group["params"]}
        found = {device: compiler(device) for device in devices}
        names = ", ".join(sorted({name for name in found.values() if name}))
        plain = "plain torch, block by block"
        if self.compiled is not None:
            return self.compiled, f"compiled ({names})" if self.compiled else f"{plain} (compiled=False)"
        size = sum(p.numel() for group in self.param_groups for p in group["params"])
        if size < WORTH_COMPILING:
            return False, f"{plain} ({size:,} elements are too few to compile this equation for)"
        if not all(found.values()):
            return False, f"{plain} (no compiler was found)"
        return True, f"compiled ({names})"

    def _is_ready(self, group: Mapping[str, Any]) -> bool:
        """Whether there is a kernel for a group's step at the batch size of its tuning, with the state that it has."""
        from gradstats.native import adam

        b = group["batch_size"]
        return all(adam.serves(self.update(group, b, self.state.get(p, {})), p) for p in group["params"])

    def describe(self, *batch_sizes: float) -> str:
        """A table of the values at these batch sizes, in torch's units where torch has such an optimizer."""
        from gradstats.optim.describe import describe

        return describe(self, *batch_sizes)

    def to_torch(self, batch_size: int) -> Optimizer:
        """torch's optimizer that goes on as this one does at batches of `batch_size`: see convert.py."""
        from gradstats.optim.convert import to_torch

        return to_torch(self, batch_size)

    # Stepping

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, batch_size: int | None = None) -> Any:
        """One step on the gradients and statistics of the last backward pass(es).

        `batch_size` is for optimizers that read no statistics, with models that are not attached. Raises:
        MissingStatistic for a gradient without statistics that are needed; LifetimeError where it no longer goes with
        them; GradstatsError where a part of them (attach(..., every=k, fraction=f)) is not enough. A step with lr = 0
        before any backward only allocates state, as distributed checkpointing wants.
        """
        loss = None
        if closure is not None and not callable(closure):
            raise GradstatsError(
                f"step takes a closure, not {closure!r}: the number of examples is step(batch_size=...)"
            )
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if batch_size is not None and (type(batch_size) is not int or batch_size < 1):
            raise GradstatsError(f"batch_size is a number of examples, at least 1; got {batch_size!r}")
        loss_scale = self._loss_scale()
        if loss_scale is not None:
            self._step(loss_scale, batch_size)
        return loss

    @torch.compiler.disable
    def _step(self, loss_scale: float, batch_size: int | None) -> None:
        found = find(self, batch_size)
        if not found:
            return
        b = max(one.window.batch_size for one in found)
        for group in self.param_groups:  # options may have been set since
            self.check(group)
        for schedule in self._schedules:
            schedule(b)
        parts = parts_of(self, found, loss_scale)
        self.prepare(parts)
        self._run(parts)
        for part in parts:
            part.grow_older()
        for index in {one.group for one in found}:
            self.param_groups[index]["examples"] += b

    def _run(self, parts: list[Part]) -> None:
        """The updates over all elements."""
        compiled, ready = self._compiles(parts), self.compiled is not False
        bounds = {part.group["max_norm"] for part in parts if "max_norm" in self.defaults} - {None}
        if not bounds:
            for part in parts:
                run(part.update, "both", part.columns, part.scalars, compiled, ready)
            return
        for part in parts:
            if part.update.buffers:
                run(part.update, "averages", part.columns, part.scalars, compiled, ready)
        clip = clip_factors(parts, bounds)
        for part in parts:
            scalars = part.scalars | {"clip": clip.get(part.group["max_norm"], 1.0)}
            run(part.update, "move", part.columns, scalars, compiled, ready)

    def _compiles(self, parts: list[Part]) -> bool:
        """What `path` says, which sums over all parameters: anew where some were added or moved to another device."""
        devices = {part.columns["parameter"][0].device.type for part in parts}
        known = self.compiled, devices, [len(group["params"]) for group in self.param_groups]
        if self._chosen[0] != known:
            self._chosen = known, self._form()[0]
        return self._chosen[1]

    def _loss_scale(self) -> float | None:
        """What GradScaler multiplied the loss by, 1 without it; None for a step to skip, since gradients overflowed.

        GradScaler leaves the unscaling to optimizers with `_step_supports_amp_scaling`, as here: squares need it twice.
        """
        found_inf, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        if found_inf is None:
            return 1.0
        if float(found_inf) > 0:
            return None
        return 1.0 if scale is None else float(scale)

    # State

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"compiled": self.compiled}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.setdefault("_schedules", [])  # those of a copy are its own
        self._chosen, self.tallies = (None, False), defaultdict(Tally)
        self._step_supports_amp_scaling = True
        super().__setstate__(state)
        for group in self.param_groups:  # saved by a version without some of the options
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def allocate(self, batch_size: int) -> None:
        """Makes the state that batches of this size need, as they would: for torch.distributed.checkpoint, which loads
        only into what is there. Averages at batches smaller than R keep more than at others."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.requires_grad:
                    state = state_of(self, p, group)
                    allocate(p, state, self.update(group, batch_size, state))

    def state_dict(self) -> dict[str, Any]:
        """As torch's; each group says what the state of its parameters holds."""
        return with_held(super().state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but the averages keep their own dtype: torch would cast float32 moments to a bfloat16
        parameter's. Raises: GradstatsError for the state of another kind of optimizer, or of other parameters, or for
        a part of a state."""
        loaded: dict[str, Any] = {}

        def last(_: Optimizer, state: dict[str, Any]) -> None:
            """What torch loads, once the user's own hooks have changed it."""
            state["param_groups"] = [dict(group) for group in state["param_groups"]]
            check_saved(self, state)
            loaded.update(state)

        hook = self.register_load_state_dict_pre_hook(last)
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        restore(self, loaded)
        for group in self.param_groups:
            self.check(group)
