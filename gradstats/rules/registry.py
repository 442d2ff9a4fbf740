"""What a rule is, and which layer has which.

A rule says how a leaf computes its forward and what its parameters' contributions are; there is a file for every kind
of layer. A composite says how a layer is made of several rules. Both are found along the MRO of the module's class
(FSDP swaps the class), up to the class that they were written for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gradstats.contribution import Contribution
from gradstats.errors import CoverageError

# By class, or by qualified name for classes of libraries that this one does not import.
RULES: dict[type[nn.Module] | str, type[Rule] | type[Composite]] = {}

# Methods in which a layer computes its output; a subclass that overrides one is another layer.
COMPUTES = ("forward", "_conv_forward", "_check_input_dim")


class Rule(ABC):
    """Forward and backward of one kind of layer, without state.

    `saved` is whatever tensors backward needs; `parameters` maps the module's own names to tensors, None where absent.
    Where a layer takes several inputs, or gives several outputs, x, y and d are tuples of tensors. The examples are in
    the first dimension of all of them.
    """

    # All that the module may own directly; other tools rename what they reparametrise.
    parameters: ClassVar[tuple[str, ...]] = ("weight", "bias")
    # Tensors that forward takes, in order.
    inputs: ClassVar[tuple[str, ...]] = ("input",)
    # Whether examples may be in any dimension of the module's input, since the layer treats leading ones alike.
    leading_alike: ClassVar[bool] = False
    # What autocast does to this layer's inputs: run in the low precision, in float32, or leave alone.
    autocast: ClassVar[Literal["low", "float32"] | None] = None

    @staticmethod
    def check(module: Any) -> None:
        """Raises CoverageError for settings of the module that the rule does not cover."""

    @staticmethod
    def bind(module: Any, input: Any) -> Any:
        """x from the arguments of the module's call. Overridden with the layer's own signature."""
        return input

    @staticmethod
    def unbatched(module: Any, x: Any) -> bool:
        """Whether x lacks the dimension of examples."""
        return x.dim() < 2

    @staticmethod
    def looked_up(x: Any) -> Tensor | None:
        """Rows of the parameter that a use touches, ids (n, ...); None: all of them."""
        return None

    @staticmethod
    def options(module: Any) -> tuple[Any, ...]:
        """What forward and backward must know of the module beside its parameters."""
        return ()

    @staticmethod
    @abstractmethod
    def forward(options: tuple[Any, ...], x: Any, parameters: dict[str, Any]) -> tuple[Any, tuple]:
        """Output and what backward needs."""

    @staticmethod
    @abstractmethod
    def backward(
        options: tuple[Any, ...], saved: tuple, d: Any, wanted: frozenset[str]
    ) -> tuple[Any, dict[str, Contribution]]:
        """Gradient of x (None for what is not wanted) and the contribution of every parameter wanted, from d =
        dL/doutput. `wanted` holds names of inputs and of parameters."""


class Composite(ABC):
    """A layer written out in terms of rules."""

    @staticmethod
    def check(module: Any) -> None:
        """Raises CoverageError for settings of the module that are not covered."""

    @staticmethod
    @abstractmethod
    def example_dim(module: Any, args: tuple, kwargs: dict[str, Any]) -> int:
        """Where the layer's own contract puts the examples in its first input."""

    @staticmethod
    @abstractmethod
    def forward(module: Any, apply: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The module's output. apply(rule, options, x, names) -> y, where `names` maps the rule's parameters to the
        module's attributes, None where absent."""


def rule(*kinds: type[nn.Module] | str):
    """Registers the decorated Rule for the given module classes, or qualified names of classes."""

    def register(cls: type[Rule]) -> type[Rule]:
        RULES.update(dict.fromkeys(kinds, cls))
        return cls

    return register


def composite(*kinds: type[nn.Module]):
    """Registers the decorated Composite for the given module classes."""

    def register(cls: type[Composite]) -> type[Composite]:
        RULES.update(dict.fromkeys(kinds, cls))
        return cls

    return register


def find(module: nn.Module) -> type[Rule] | type[Composite] | None:
    """What was written for the layer that this module computes, or None.

    Raises: CoverageError if its parameters were renamed.
    """
    kinds = type(module).__mro__
    for i, kind in enumerate(kinds):
        found = RULES.get(kind) or RULES.get(f"{kind.__module__}.{kind.__qualname__}")
        if found is None:
            continue
        overridden = {name for cls in kinds[:i] for name in cls.__dict__ if name in COMPUTES}
        if overridden:
            return None
        strangers = set(module._parameters) - set(found.parameters) if issubclass(found, Rule) else set()
        if strangers:
            raise refuse(
                module,
                f"a hook computes its parameters from '{min(strangers)}' before each forward (old weight_norm, prune)",
                "Use torch.nn.utils.parametrizations",
            )
        return found
    return None


def refuse_coupling(module: nn.Module) -> None:
    """Raises CoverageError for normalisation over the batch, with or without parameters of its own."""
    if isinstance(module, _BatchNorm) and (module.training or not module.track_running_stats):
        raise refuse(
            module,
            "batch statistics make every example's output depend on the others, so per-example gradients do not exist",
            "Replace it by nn.GroupNorm, freeze its statistics with .eval(), or take an engine that sees losses or "
            "whole backward passes: engine='random_sign' or 'microbatch'",
        )


def refuse_scripted(module: nn.Module) -> None:
    """Raises CoverageError for what computes outside of Python."""
    if isinstance(module, torch.jit.ScriptModule):
        raise refuse(
            module,
            "the layers of a scripted or traced module are called by no Python that could be attached",
            "Attach it as it was before, and take torch.compile",
        )


def refuse(module: nn.Module, reason: str, way_out: str) -> CoverageError:
    """What a check raises; `checked` puts the module's name in front of it."""
    return CoverageError(f"{type(module).__name__}: {reason}. {way_out}")


def checked(name: str, check: Callable[[Any], None], module: nn.Module) -> None:
    """Runs a check, which knows the kind of the module it refuses but not its name."""
    try:
        check(module)
    except CoverageError as error:
        raise CoverageError(f"module '{name}': {error}") from None
