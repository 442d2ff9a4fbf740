"""The handle that `attach` returns: which leaf serves which parameter, what was backpropagated, and the statistics read
from it.

Statistics live and die with p.grad: a backward that finds the gradients None (or zeroed) starts afresh, one that finds
them set accumulates. The batch size counts the examples that were backpropagated, so evaluation forwards leave no
trace.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.variable import Variable
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from gradstats.errors import CoverageError, GradstatsError, LifetimeError, MissingStatistic
from gradstats.leaf import LEAF, Leaf, swap, unswap
from gradstats.rules import fallback, find
from gradstats.rules.registry import refuse_coupling
from gradstats.statistics import STATISTICS, Statistic, Window

LOSS_REDUCTIONS = ("mean", "sum")

# From a parameter to the handle that keeps its statistics; weak on both sides.
_handles: WeakIdKeyDictionary = WeakIdKeyDictionary()


def handle_of(parameter: Tensor) -> Handle | None:
    """The handle attached to the model that owns `parameter`; how optimizers find the statistics."""
    reference = _handles.get(parameter)
    return None if reference is None else reference()


class Handle:
    """Statistics of the per-example gradients of one model. Made by `gradstats.attach`."""

    def __init__(self, model: nn.Module, statistics: Sequence[str], loss_reduction: str):
        unknown = [name for name in statistics if name not in STATISTICS]
        if unknown:
            raise GradstatsError(f"unknown statistic {unknown[0]!r}; the menu is {sorted(STATISTICS)}")
        if loss_reduction not in LOSS_REDUCTIONS:
            raise GradstatsError(f"loss_reduction must be one of {LOSS_REDUCTIONS}, not {loss_reduction!r}")
        self.model = model
        self.loss_reduction = loss_reduction
        self.sums = tuple(dict.fromkeys(need for name in statistics for need in STATISTICS[name].needs))
        self.leaves: dict[str, tuple[Leaf, str]] = {}  # full parameter name -> its leaf, name within the leaf
        self._leaves: list[Leaf] = []
        self._root_hooks: list[Any] = []
        self._forget()

    def _forget(self) -> None:
        self._names: dict[int, str] = {}  # id of a registered parameter -> its full name
        self.sizes: dict[int, int] = {}  # examples backpropagated in this window, by generation
        self.generation = 0  # forwards between the same two backward passes share one
        self._first_open = 0  # the first generation after the last backward pass
        self.backward_passes = 0
        self._tasks: set[int] = set()  # graph tasks of the backward pass under way, nested ones included
        self._started = False  # a leaf has been reached in it
        self._inside = False  # the model's own forward is under way
        self._batch: int | None = None  # leading dimension of the model's first input

    def __getstate__(self) -> dict[str, Any]:
        kept = ("model", "loss_reduction", "sums", "leaves", "_leaves", "_root_hooks")
        return {key: getattr(self, key) for key in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    # Attaching

    def install(self, whole: bool = False) -> None:
        """Swaps the class of every leaf; `whole` makes the model itself one vmap leaf."""
        try:
            if whole:
                self._add(self.model, "", None)
            else:
                self._walk(self.model, "", set())
            self._root_hooks = [
                self.model.register_forward_pre_hook(self._enter, with_kwargs=True),
                self.model.register_forward_hook(self._leave, always_call=True),
            ]
        except GradstatsError:
            self.detach()
            raise
        if not any(leaf.parameter(name).requires_grad for leaf, name in self.leaves.values()):
            self.detach()
            raise CoverageError(f"{type(self.model).__name__} has no trainable parameters")

    def _walk(self, module: nn.Module, prefix: str, visited: set[int]) -> None:
        if id(module) in visited:
            return
        visited.add(id(module))
        refuse_coupling(module)
        parameterised = any(p is not None for p in module._parameters.values()) or parametrize.is_parametrized(module)
        if parameterised:
            rule = None if parametrize.is_parametrized(module) else find(module)
            trainable = any(p.requires_grad for p in module.parameters())
            if rule is not None or trainable:
                self._add(module, prefix, rule)
            return
        for name, child in module.named_children():
            self._walk(child, f"{prefix}.{name}" if prefix else name, visited)

    def _add(self, module: nn.Module, prefix: str, rule) -> None:
        if LEAF in module.__dict__:
            raise GradstatsError(
                f"module '{prefix}' is attached already: use gradstats.attached(model), or detach() it first"
            )
        if rule is None:
            fallback.check(module)
            parameters = dict(module.named_parameters())
        else:
            rule.check(module)
            parameters = {name: p for name, p in module._parameters.items() if p is not None}
        leaf = Leaf(self, module, prefix, rule, parameters)
        owners = {id(other.parameter(name)): full for full, (other, name) in self.leaves.items()}
        for name, p in parameters.items():
            full = leaf.full_name(name)
            if id(p) in owners:
                raise CoverageError(
                    f"parameter '{full}' {tuple(p.shape)} is shared with '{owners[id(p)]}': their contributions must "
                    f"be summed per example before squaring. attach(model, engine='vmap') does so for models that vmap."
                )
            self.leaves[full] = (leaf, name)
        swap(module, leaf)
        self._leaves.append(leaf)

    def detach(self) -> None:
        """Leaves the model as it was before `attach`."""
        for hook in self._root_hooks:
            hook.remove()
        for leaf, name in self.leaves.values():
            _handles.pop(leaf.parameter(name), None)
            leaf.detach()
        for leaf in self._leaves:
            unswap(leaf.module)
        self.leaves, self._leaves, self._root_hooks = {}, [], []

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    def register(self, parameter: Tensor, full: str) -> None:
        _handles[parameter] = weakref.ref(self)
        self._names[id(parameter)] = full

    # Forward

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._inside = True
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.dim() > 0]
        self._batch = tensors[0].shape[0] if tensors else None

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._inside = False

    def begin_forward(self) -> int:
        """The generation of a leaf's call."""
        if in_backward():  # recomputed under checkpointing: this pass lasts until the task that asked for it ends
            self._watch()
        elif self._tasks:  # a backward pass was cut short by an exception
            self._close()
        return self.generation

    def examples(self, leaf: Leaf, x: Tensor) -> tuple[Tensor, int]:
        """x (n, ...) with the number of examples; a leading 1 that the batch shares (position ids) is expanded."""
        batch = self._batch if self._inside or in_backward() else None
        n = x.shape[0]
        if batch is None or n == batch:
            return x, n
        if n == 1:
            return x.expand(batch, *x.shape[1:]), batch
        if not self._inside:  # recomputed after another forward: `begin_backward` compares the sizes
            return x, n
        raise CoverageError(
            f"module '{leaf.prefix}' ({type(leaf.module).__name__}) got an input of shape {tuple(x.shape)}, but the "
            f"model's batch has {batch} examples: its first dimension must run over the examples. Keep that dimension "
            f"in front (do not flatten positions into it), or use attach(model, engine='vmap')."
        )

    def new_examples(self) -> None:
        """Declares that the forwards from here on see other examples than those before, although no backward came
        between."""
        self.generation += 1

    # Backward

    def begin_backward(self, leaf: Leaf, use: tuple[str, ...], n: int, generation: int) -> None:
        """Called once a use of a leaf's parameters, before its gradients are accumulated."""
        self._watch()
        if not self._started:
            self._started = True
            self.backward_passes += 1
            for other in self._leaves:
                other.returned.clear()
            if all(other.fresh() for other in self._leaves):
                self.zero()
        size = self.sizes.setdefault(generation, n)
        if size != n:
            raise CoverageError(
                f"module '{leaf.prefix}' ({type(leaf.module).__name__}) saw {n} rows where the layers before it in "
                f"this backward pass saw {size}: the first dimension of every layer must run over the examples. "
                f"Use attach(model, engine='vmap')."
            )
        if leaf.backward_pass != self.backward_passes:
            leaf.backward_pass = self.backward_passes
            if leaf.generations and leaf.fresh():  # zeroed while other parameters' gradients were kept
                leaf.reset(first=self._first_open)
        if leaf.generations.get(use) == generation:
            raise self._second_use(leaf)
        leaf.generations[use] = generation

    def _second_use(self, leaf: Leaf) -> LifetimeError:
        return LifetimeError(
            f"module '{leaf.prefix}' ({type(leaf.module).__name__}) was used twice for one backward pass, or one use "
            f"of it was backpropagated twice: contributions of the same example must be summed before squaring. If the "
            f"forwards saw different examples, say so with stats.new_examples() between them; if a layer is shared, "
            f"use attach(model, engine='vmap')."
        )

    def _watch(self) -> None:
        """Notes the graph task that runs; when all noted ones have ended, so has the backward pass.

        Reentrant checkpointing runs a backward pass within another: its end is not the end of the outer one.
        """
        task = torch._C._current_graph_task_id()
        if task not in self._tasks:
            self._tasks.add(task)
            Variable._execution_engine.queue_callback(lambda: self._end(task))

    def _end(self, task: int) -> None:
        self._tasks.discard(task)
        if not self._tasks:
            self._close()

    def _close(self) -> None:
        self._tasks.clear()
        self._started = False
        self.generation += 1
        self._first_open = self.generation
        for leaf in self._leaves:
            leaf.remember_versions()

    def zero(self) -> None:
        """Forgets all statistics."""
        self.sizes.clear()
        for leaf in self._leaves:
            leaf.reset(first=0)

    # Reading

    def names(self) -> list[str]:
        """Names of the trainable parameters."""
        return [full for full, (leaf, name) in self.leaves.items() if leaf.parameter(name).requires_grad]

    def name_of(self, key: str | Tensor) -> str:
        if isinstance(key, str):
            if key not in self.leaves:
                raise MissingStatistic(
                    f"no parameter '{key}' in the attached model; its parameters are {list(self.leaves)}"
                )
            return key
        if (known := self._names.get(id(key))) is not None and self._is(known, key):
            return known
        for full in self.leaves:
            if self._is(full, key):
                return full
        raise MissingStatistic(f"a parameter of shape {tuple(key.shape)} does not belong to the attached model")

    def _is(self, full: str, parameter: Tensor) -> bool:
        leaf, name = self.leaves[full]
        return leaf.parameter(name) is parameter

    def window(self, key: str | Tensor, needs: Sequence[str], needs_gradient: bool = False) -> Window:
        """Raw sums of one parameter since its gradient was last None."""
        full = self.name_of(key)
        missing = [need for need in needs if need not in self.sums]
        if missing:
            entries = [s.name for s in STATISTICS.values() if missing[0] in s.needs]
            raise MissingStatistic(f"'{missing[0]}' was not collected: attach(model, {entries[0]!r}, ...)")
        leaf, name = self.leaves[full]
        sums = {}
        for need in needs:
            value = leaf.value(name, need)
            if value is None:
                raise MissingStatistic(
                    f"parameter '{full}' has no statistics: no backward pass has reached it since they were last "
                    f"zeroed. Call loss.backward() on the attached model first (torch.autograd.grad leaves none)."
                )
            sums[need] = value
        return Window(sums, leaf.gradient(name) if needs_gradient else None, leaf.batch_size, self.loss_reduction)

    def read(self, statistic: str) -> ByParameter:
        """A statistic of every parameter, computed when an entry is read."""
        return ByParameter(self, STATISTICS[statistic])

    @property
    def batch_size(self) -> int:
        """B: examples backpropagated since the gradients were last None."""
        return sum(self.sizes.values())

    @property
    def second_moment(self) -> ByParameter:
        """q = (1/B) sum_b g_b^2 of every parameter."""
        return self.read("second_moment")

    @property
    def variance(self) -> ByParameter:
        """s2 = B/(B-1) (q - m^2) of every parameter."""
        return self.read("variance")

    @property
    def norms(self) -> Norms:
        """||g_b|| per example (B,), of every parameter and (`.total`) of the whole gradient."""
        return Norms(self, STATISTICS["norms"])

    def coverage(self) -> str:
        """A table: parameter, shape, and what serves it."""
        rows = [("parameter", "shape", "served by")]
        for full, (leaf, name) in self.leaves.items():
            p = leaf.parameter(name)
            served = f"rule {leaf.rule.__name__}" if leaf.rule else f"vmap over {type(leaf.module).__name__}"
            rows.append((full, str(tuple(p.shape)), served if p.requires_grad else "frozen"))
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


class ByParameter(Mapping[str, Tensor]):
    """One statistic, keyed by parameter names or by Parameters."""

    def __init__(self, handle: Handle, statistic: type[Statistic]):
        self.handle, self.statistic = handle, statistic

    def __getitem__(self, key: str | Tensor) -> Tensor:
        return self.statistic.read(self.handle.window(key, self.statistic.needs, self.statistic.needs_gradient))

    def __iter__(self) -> Iterator[str]:
        return iter(self.handle.names())

    def __len__(self) -> int:
        return len(self.handle.names())

    def __repr__(self) -> str:
        return f"{self.statistic.name} of {len(self)} parameters, batch size {self.handle.batch_size}"


class Norms(ByParameter):
    """Per-example norms, (B,) each."""

    @property
    def total(self) -> Tensor:
        """||g_b|| of the whole gradient (B,)."""
        return torch.stack([norm.square() for norm in self.values()]).sum(0).sqrt()


def in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
