"""What a backward pass adds, and which forwards it is of: watches a model from outside, whatever it is made of.

Hooks on the nodes that accumulate gradients tell what a backward pass adds to each parameter, and a hook on what the
model returns, which forwards it goes through. torch.autograd.grad accumulates nothing and leaves no trace.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.variable import Variable
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from gradstats.arguments import ExampleDims, count_examples
from gradstats.errors import CoverageError, LifetimeError
from gradstats.graph import accumulator_of, in_backward

if TYPE_CHECKING:
    from gradstats.engines.outside import OutsideHandle


@dataclass(eq=False)
class Forward:
    """A call of the model with gradients."""

    generation: tuple[int, int]  # calls between the same two backward passes share it
    examples: int


@dataclass
class Pass:
    """A backward pass under way, nested ones included: what it goes through, and what arrives where."""

    tasks: set[int] = field(default_factory=set)  # graph tasks that have not ended
    forwards: list[Forward] = field(default_factory=list)
    arrived: dict[str, Tensor] = field(default_factory=dict)
    began: set[str] = field(default_factory=set)  # of these, with a gradient that was None or zeroed
    changed: set[str] = field(default_factory=set)  # of these, with a gradient that was changed since the last pass
    found: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # of these, sums that were asked for already


class Passes:
    """Of one model; tells `handle` of the end of every backward pass that accumulated."""

    def __init__(self, handle: OutsideHandle, ignored: Collection[str]):
        self.handle, self.model, self.ignored = handle, handle.model, ignored
        self.parameters: dict[str, nn.Parameter] = {}
        self.current: Pass | None = None
        self.ended = 0  # backward passes, those that accumulated nothing included
        self._accumulators: dict[str, tuple[Any, Any]] = {}  # by parameter, the node that adds to p.grad, and its hook
        self.follow()
        self._hook = self.model.register_forward_hook(self._forward)  # and so the model keeps the handle

    def close(self) -> None:
        self._hook.remove()
        for _, hook in self._accumulators.values():
            hook.remove()
        self.parameters = {}

    def begin(self) -> None:
        """Before a backward pass: parameters may have been moved or replaced, and the last one cut short by an
        exception."""
        self.current = None
        self.follow()

    @torch.enable_grad()
    def follow(self) -> None:
        """Hooks the nodes that accumulate gradients."""
        self.parameters = {name: p for name, p in self.model.named_parameters() if name not in self.ignored}
        for name, p in self.parameters.items():
            if not (p.requires_grad and p.is_leaf):
                continue
            if p.is_complex():
                raise CoverageError(f"parameter '{name}' is complex: squares are of real gradients. Use ignore=[...]")
            if is_lazy(p):
                raise CoverageError(f"parameter '{name}' is not initialised: call the model once before attach")
            node = accumulator_of(p)  # another one after a change of dtype or device, also if that was undone
            known, hook = self._accumulators.get(name, (None, None))
            if node is not known:
                if hook is not None:
                    hook.remove()
                self._accumulators[name] = node, node.register_prehook(lambda d, name=name: self._arrives(name, *d))
                self.handle.register(p, name)

    @torch.compiler.disable
    def _forward(self, *_: Any) -> None:
        if torch.is_grad_enabled():
            self.handle.look_around()
            if in_backward():
                self.watch()
                self.follow()
            else:
                self.begin()

    def watch(self) -> Pass:
        """The backward pass under way. It ends with the last of its graph tasks: reentrant checkpointing nests them."""
        if self.current is None:
            self.current = Pass()
            self.handle.begin_pass()
        current, task = self.current, torch._C._current_graph_task_id()
        if task not in current.tasks:
            current.tasks.add(task)
            Variable._execution_engine.queue_callback(lambda: self._end(current, task))
        return current

    def _arrives(self, name: str, gradient: Tensor | None) -> None:
        """Before `gradient` is accumulated."""
        if gradient is None:
            return
        current = self.watch()
        if name in current.arrived:
            current.arrived[name] = current.arrived[name] + gradient
            return
        current.arrived[name] = gradient
        if self.handle.begins(name):
            current.began.add(name)
        elif self.handle.changed(name):
            current.changed.add(name)

    def _end(self, current: Pass, task: int) -> None:
        current.tasks.discard(task)
        if current.tasks or self.current is not current:
            return
        self.current = None
        self.ended += 1
        if current.arrived:
            self.handle.commit(current)
            if self.handle.exchange is not None:
                self.handle.exchange.ended()


class Forwards:
    """Calls of a model with gradients, and which of them a backward pass goes through."""

    def __init__(self, passes: Passes, example_dims: ExampleDims):
        self.passes, self.model, self.example_dims = passes, passes.model, example_dims
        self._declared = 0  # times that the user said that examples are new
        self._used: set[tuple[int, int]] = set()  # generations of the forwards backpropagated since `forget`
        self._hook = self.model.register_forward_hook(self._forward, with_kwargs=True)

    def close(self) -> None:
        self._hook.remove()

    def new_examples(self) -> None:
        self._declared += 1

    def forget(self) -> None:
        self._used.clear()

    @torch.compiler.disable
    def _forward(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if not torch.is_grad_enabled():
            return
        generation = self.passes.ended, self._declared
        forward = Forward(generation, count_examples(args, kwargs, self.example_dims))
        marked = [o for o in tree_leaves(output) if isinstance(o, Tensor) and o.requires_grad and not o.is_leaf]
        for o in marked:
            o.register_hook(lambda gradient: self._reaches(forward))
        if not marked:
            raise CoverageError(
                f"{type(model).__name__} returns no tensor that depends on its parameters (alone, or in a tuple, list "
                f"or dict), so that no backward pass could be seen to go through it. Call it under torch.no_grad(), or "
                f"attach the module that returns tensors"
            )

    def _reaches(self, forward: Forward) -> None:
        forwards = self.passes.watch().forwards
        if forward not in forwards:
            forwards.append(forward)

    def examples(self, forwards: Sequence[Forward]) -> int:
        """How many examples a backward pass was over. Raises: LifetimeError if that cannot be told."""
        title = type(self.model).__name__
        if not forwards:
            raise LifetimeError(
                f"a backward pass reached the parameters without going through what {title} returned, so the number of "
                f"its examples is unknown. Call {title} itself, or attach the module that is called, and apply "
                f"penalties in the optimizer"
            )
        for forward in forwards:
            if forward.generation in self._used:
                raise LifetimeError(
                    f"{title} was called twice before one backward pass, or one call of it was backpropagated twice: "
                    f"one micro-batch is one forward and one backward. If the calls saw different examples, say so "
                    f"with stats.new_examples() between them; if they saw the same ones, make them from the forward of "
                    f"one module, and attach that module"
                )
            self._used.add(forward.generation)
        return sum(forward.examples for forward in forwards)
