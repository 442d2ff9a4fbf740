"""One file per kind of layer. A rule says how a leaf computes its forward and what its parameters' contributions are.

A rule is found along the MRO of the module's class (FSDP swaps the class), up to the class that it was written for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gradstats.contribution import Contribution
from gradstats.errors import CoverageError

RULES: dict[type[nn.Module], type[Rule]] = {}


# Methods in which a layer computes its output; a subclass that overrides one is another layer.
COMPUTES = ("forward", "_conv_forward", "_check_input_dim")


class Rule(ABC):
    """Forward and backward of one kind of layer, without state.

    `saved` is whatever tensors backward needs; `parameters` maps the module's own names to tensors, None where absent.
    """

    # All that the module may own directly; other tools rename what they reparametrise.
    parameters: ClassVar[tuple[str, ...]] = ("weight", "bias")
    # What autocast does to this layer's inputs: run in the low precision, in float32, or leave alone.
    autocast: ClassVar[Literal["low", "float32"] | None] = None

    @staticmethod
    def check(module: Any) -> None:
        """Raises CoverageError for settings of the module that the rule does not cover."""

    @staticmethod
    def unbatched(module: Any, x: Tensor) -> bool:
        """Whether x lacks the dimension of examples."""
        return x.dim() < 2

    @staticmethod
    def options(module: Any) -> tuple[Any, ...]:
        """What forward and backward must know of the module beside its parameters."""
        return ()

    @staticmethod
    @abstractmethod
    def forward(options: tuple[Any, ...], x: Any, parameters: dict[str, Any]) -> tuple[Tensor, tuple]:
        """Output and what backward needs."""

    @staticmethod
    @abstractmethod
    def backward(
        options: tuple[Any, ...], saved: tuple, d: Tensor, wanted: frozenset[str]
    ) -> tuple[Tensor | None, dict[str, Contribution]]:
        """Gradient of the input (if "input" is wanted) and the contribution of every parameter wanted, from d =
        dL/doutput."""


def rule(*kinds: type[nn.Module]):
    """Registers the decorated Rule for the given module classes."""

    def register(cls: type[Rule]) -> type[Rule]:
        RULES.update(dict.fromkeys(kinds, cls))
        return cls

    return register


def find(module: nn.Module) -> type[Rule] | None:
    """The rule written for what this module computes, or None. Raises: CoverageError if its parameters were renamed."""
    kinds = type(module).__mro__
    for i, kind in enumerate(kinds):
        if kind not in RULES:
            continue
        overridden = {name for cls in kinds[:i] for name in cls.__dict__ if name in COMPUTES}
        if overridden:
            return None
        found = RULES[kind]
        strangers = set(module._parameters) - set(found.parameters)
        if strangers:
            raise refuse(
                module,
                f"a hook computes its parameters from '{min(strangers)}' before each forward (old weight_norm, prune)",
                "Use torch.nn.utils.parametrizations",
            )
        return found
    return None


def example_sum(c: Tensor, keep: int) -> Tensor:
    """Sums (n, positions..., kept dimensions) over positions: (n, kept dimensions), `keep` trailing ones kept."""
    return c if c.dim() == keep + 1 else c.flatten(1, -keep - 1).sum(1)


def refuse_coupling(module: nn.Module) -> None:
    """Raises CoverageError for normalisation over the batch, with or without parameters of its own."""
    if isinstance(module, _BatchNorm) and (module.training or not module.track_running_stats):
        raise refuse(
            module,
            "batch statistics make every example's output depend on the others, so per-example gradients do not exist",
            "Replace it by nn.GroupNorm, or freeze its statistics with .eval()",
        )


def refuse(module: nn.Module, reason: str, way_out: str) -> CoverageError:
    return CoverageError(f"{type(module).__name__}: {reason}. {way_out}")


def checked(name: str, check: Callable[[Any], None], module: nn.Module) -> None:
    """Runs a check, which knows the kind of the module it refuses but not its name."""
    try:
        check(module)
    except CoverageError as error:
        raise CoverageError(f"module '{name}': {error}") from None
