"""What all optimizers share: statistics found through the parameters, time counted in examples, the contract of torch.

A step goes one way: gradients and their windows, grouped by what their step has in common -> scalars of each group ->
the optimizer's equation, over all its elements.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradstats.errors import GradstatsError
from gradstats.optim.elementwise import WORTH_COMPILING, Columns, Row, compiler, run
from gradstats.optim.found import Found, allocate, find
from gradstats.optim.options import Check, check_options
from gradstats.optim.update import STATISTICS, Update
from gradstats.sums import accumulation_dtype
from gradstats.window import Window

# Examples that averages of statistics cover: an entry of the state while batches without statistics wait for the next.
COVERED = "statistics_step"


@dataclass(frozen=True)
class Age:
    """What decides the scalars of a parameter's step: B, and the examples that its state has seen, B included."""

    batch_size: int
    examples: int
    younger: tuple[tuple[str, int], ...] = ()  # buffers that have seen fewer
    waiting: int = 0  # of the examples before this batch, those since the averages of statistics last moved
    waits: bool = False  # this batch leaves them as they are

    @property
    def stands_for(self) -> int:
        """Examples in whose place this batch moves the averages of statistics."""
        return self.batch_size + self.waiting

    @property
    def covered(self) -> int:
        """Examples that the averages of statistics have seen."""
        return self.examples - self.stands_for if self.waits else self.examples

    @property
    def of_buffers(self) -> dict[str, int]:
        return dict(self.younger)


@dataclass
class Part:
    """Parameters whose step has everything in common but the elements."""

    group: dict[str, Any]
    age: Age
    update: Update
    scalars: dict[str, Any]
    windows: list[Window] = field(default_factory=list)
    states: list[dict[str, Any]] = field(default_factory=list)
    columns: Columns = field(default_factory=dict)  # "parameter", "gradient", raw sums and buffers, in one order


class Plan(NamedTuple):
    """An update, and what it would make anew whenever it is asked: once for all parameters alike."""

    update: Update
    dtype: torch.dtype  # of the buffers
    reads: tuple[str, ...]
    buffers: tuple[str, ...]
    younger: tuple[str, ...]
    numbers: tuple[str, ...]
    waits: bool


def plan_of(update: Update, dtype: torch.dtype) -> Plan:
    """For parameters of the given dtype."""
    names = update.reads, update.buffers, update.younger, update.numbers
    return Plan(update, accumulation_dtype(dtype), *names, update.waits)


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
        compiled: one compiled kernel for the whole step, or block by block in plain torch; None compiles from a
            million elements on where there is a compiler. `path` says which.

    Statistics come from `gradstats.attach(model)`, found through the parameters. What reads none of them needs the
    batch size only, which `step(batch_size=B)` gives for a model that is not attached. The state's "step" counts
    examples, as an integer; the groups' "examples" do for schedules.
    """

    checks: ClassVar[Mapping[str, Check]] = {}  # of options that no other optimizer has: options.py

    def __init__(self, params: Any, options: dict[str, Any], compiled: bool | None = None):
        self.compiled = compiled
        self._schedules: list[Callable[[int], None]] = []  # called with B before every step
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
        devices = {p.device.type for group in self.param_groups for p in group["params"]}
        found = {device: compiler(device) for device in devices}
        names = ", ".join(sorted({name for name in found.values() if name}))
        if self.compiled is not None:
            return f"compiled ({names})" if self.compiled else "plain torch, block by block (compiled=False)"
        size = sum(p.numel() for group in self.param_groups for p in group["params"])
        if size < WORTH_COMPILING:
            return f"plain torch, block by block ({size:,} elements are too few to be worth compiling)"
        if not all(found.values()):
            return "plain torch, block by block (no compiler was found)"
        return f"compiled ({names})"

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
        them. A step with lr = 0 before any backward only allocates state, as distributed checkpointing wants.
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
        parts = self._parts(found, loss_scale)
        compiled = self.path.startswith("compiled")
        self.prepare(parts)
        bounds = {part.group["max_norm"] for part in parts if "max_norm" in self.defaults} - {None}
        if bounds:
            for part in parts:
                if part.update.buffers:
                    run(part.update, "averages", part.columns, part.scalars, compiled)
            clip = clip_factors(parts, bounds)
            for part in parts:
                scalars = part.scalars | {"clip": clip.get(part.group["max_norm"], 1.0)}
                run(part.update, "move", part.columns, scalars, compiled)
        else:
            for part in parts:
                run(part.update, "both", part.columns, part.scalars, compiled)
        for part in parts:
            b = part.age.batch_size
            if part.update.waits or part.age.waiting:
                note_waiting(part)
            torch._foreach_add_([state["step"] for state in part.states], b)
            for name in part.update.younger:
                growth = part.update.growth(name, b, part.age.waiting)
                torch._foreach_add_([state[f"{name}_step"] for state in part.states], growth)
        for index in {one.group for one in found}:
            self.param_groups[index]["examples"] += b

    def _parts(self, found: list[Found], loss_scale: float) -> list[Part]:
        parts: dict[tuple[Any, ...], tuple[Part, list[Row]]] = {}
        plans: dict[tuple[Any, ...], Plan] = {}
        for index, p, state, window in found:
            group, b, gradient = self.param_groups[index], window.batch_size, p.grad
            choice = (index, b, p.dtype, bool(window.sums), *state)
            plan = plans.get(choice)
            if plan is None:
                plan = plans[choice] = plan_of(self._update(group, b, state, window), p.dtype)
            update, dtype, reads, buffers, younger, numbers, waits = plan
            assert gradient is not None
            row = [p, gradient.to_dense() if gradient.is_sparse else gradient, *[window.sums[name] for name in reads]]
            for name in buffers:
                if name not in state or state[name].dtype != dtype:
                    allocate(p, state, update)
                row.append(state[name])
            before = state["step"].item()
            seen, waiting = before + b, before - int(state.get(COVERED, before))
            if waits and waiting == before:  # there is no average yet
                continue
            ages = tuple([(name, int(state[f"{name}_step"]) + update.growth(name, b, waiting)) for name in younger])
            values = tuple([float(state[name]) for name in numbers])
            key = (choice, seen, waiting, ages, values, window.scale, window.loss_scale, p.device)
            if key not in parts:
                age = Age(b, seen, ages, waiting, waits)
                scalars = self._common(group, age, update, window, loss_scale) | self.scalars(group, age, update)
                parts[key] = Part(group, age, update, scalars), []
            part, rows = parts[key]
            part.windows.append(window)
            part.states.append(state)
            rows.append(row)
        for part, rows in parts.values():
            names = ("parameter", "gradient", *part.update.reads, *part.update.buffers)
            part.columns = dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))
        return [part for part, _ in parts.values()]

    def _update(self, group: Mapping[str, Any], b: int, state: Mapping[str, Any], window: Window) -> Update:
        update = self.update(group, b, state)
        if not (update.statistics and window.sampled):
            return update
        sampled = update.sampled(state, bool(window.sums))
        if sampled is None:
            assert window.sums  # or `find` has refused
            return update
        return sampled

    def _common(
        self, group: Mapping[str, Any], age: Age, update: Update, window: Window, loss_scale: float
    ) -> dict[str, Any]:
        sign, b = -1.0 if group["maximize"] else 1.0, age.batch_size
        scalars: dict[str, Any] = {"mean_scale": sign * window.mean_scale / loss_scale}
        for name in update.statistics:
            _, power, odd = STATISTICS[name]
            scalars[f"{name}_scale"] = (sign if odd else 1.0) * (window.scale / loss_scale) ** power / b
        decay: Any = 1.0
        if update.coupled:
            scalars["l2"] = group["weight_decay"]
        elif group["weight_decay"] != 0:
            lr, rate = group["lr"], group["weight_decay"]
            known = not isinstance(lr, Tensor) or lr.device.type == "cpu"
            if known and lr * rate > 1:
                raise GradstatsError(f"lr = {float(lr)} times weight_decay = {rate} is above 1: no decay factor")
            decay = (1 - lr * rate) ** (b / group["batch_size"])
        return scalars | {"decay": decay}

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
        self._step_supports_amp_scaling = True
        super().__setstate__(state)
        for group in self.param_groups:  # saved by a version without some of the options
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but the averages keep their own dtype: torch would cast float32 moments to a bfloat16
        parameter's."""
        loaded: dict[str, Any] = {}

        def last(_: Optimizer, state: dict[str, Any]) -> None:
            """What torch loads, once the user's own hooks have changed it."""
            self._check_state(state)
            loaded.update(state)

        hook = self.register_load_state_dict_pre_hook(last)
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        for i, (p, group) in zip(saved_ids(loaded), self._parameters(), strict=True):
            on_cpu = self.update(group, math.inf, {}).numbers  # which decide scalars, as ages do
            for key, value in loaded["state"].get(i, {}).items():
                if key.endswith("step") or key in on_cpu:
                    self.state[p][key] = value.detach().clone().to("cpu")
                elif isinstance(value, Tensor):
                    like = p if value.shape == p.shape else value
                    self.state[p][key] = torch.empty_like(like, dtype=value.dtype, device=p.device).copy_(value)
        for group in self.param_groups:
            self.check(group)

    def _check_state(self, state: dict[str, Any]) -> None:
        """Raises: GradstatsError for the state of another kind of optimizer, or of other parameters."""
        if any("batch_size" not in group for group in state["param_groups"]):
            raise GradstatsError(
                "this state is of an optimizer that does not count examples: load it into one of its own kind, and "
                "convert that, gradstats.optim.from_torch(optimizer, batch_size)"
            )
        for i, (p, _) in zip(saved_ids(state), self._parameters(), strict=False):
            for key, value in state["state"].get(i, {}).items():
                if isinstance(value, Tensor) and value.dim() > 0 and value.shape != p.shape:
                    raise GradstatsError(
                        f"{key!r} {tuple(value.shape)} was saved for another parameter than one of shape "
                        f"{tuple(p.shape)}: parameters are told apart by their order"
                    )

    def _parameters(self) -> list[tuple[Tensor, dict[str, Any]]]:
        return [(p, group) for group in self.param_groups for p in group["params"]]


def note_waiting(part: Part) -> None:
    """Before its step, keeps the examples that averages of statistics cover, while they are fewer than all."""
    for state in part.states:
        if not part.update.waits:
            del state[COVERED]
        elif COVERED not in state:
            state[COVERED] = state["step"].clone()


def saved_ids(state: dict[str, Any]) -> list[int]:
    return [i for group in state["param_groups"] for i in group["params"]]


def clip_factors(parts: Iterable[Part], bounds: Iterable[float]) -> dict[float | None, Tensor]:
    """min(1, max_norm / norm) for every max_norm in use; the norm of what is bounded over all parameters of a step."""
    norms: list[Tensor] = []
    for part in parts:
        name, scale = "gradient", abs(part.scalars["mean_scale"])
        if part.update.bounded is not None:
            name, scale = part.update.bounded, part.scalars.get("bounded_scale", 1.0)
        norms += [norm * scale for norm in wide_norms(part.columns[name])]
    norm = torch.stack([n.to(norms[0].device, torch.float64) for n in norms]).norm()
    return {bound: (bound / norm).clamp(max=1.0) for bound in bounds}


def wide_norms(tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """Euclidean norms, in a dtype in which squares do not overflow."""
    return torch._foreach_norm(tensors, 2, accumulation_dtype(tensors[0].dtype))
