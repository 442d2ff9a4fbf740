"""Engines "fused" and "vmap": leaves under the model, shadows for their statistics.

Fused: a leaf for every module that owns parameters, by rule, or as a vmap leaf where there is none. Vmap: the whole
model is one vmap leaf.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from gradstats.account import Account
from gradstats.errors import CoverageError, GradstatsError, MissingStatistic
from gradstats.handle import Handle, table
from gradstats.leaf import LEAF, Leaf, swap, unswap
from gradstats.lifetime import Lifetime
from gradstats.rules import Rule, fallback, find
from gradstats.rules.registry import checked, refuse_coupling


class FusedHandle(Handle):
    """Reads raw sums from the leaves."""

    def __init__(self, model: nn.Module, statistics: Sequence[str], loss_reduction: str, whole: bool = False):
        super().__init__(model, statistics, loss_reduction)
        self.leaves: list[Leaf] = []
        self.accounts: dict[str, Account] = {}  # by full name of the parameter
        self.hooks: list[Any] = []
        self.batch_norms: list[nn.Module] = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        try:
            if whole:
                self._add(model, "", None)
            else:
                self._walk(model, "", set())
            if not any(p.requires_grad for p in self.parameters().values()):
                raise CoverageError(f"{type(model).__name__} has no trainable parameters")
        except GradstatsError:
            self.detach()
            raise
        self._begin()
        self.hooks = [
            model.register_forward_pre_hook(self._enter, with_kwargs=True),
            model.register_forward_hook(self._leave, always_call=True),
        ]

    def _begin(self) -> None:
        self._names = {}
        self.lifetime = Lifetime(list(self.accounts.values()), self.batch_norms)

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.lifetime.enter(args, kwargs)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.lifetime.leave()

    def __getstate__(self) -> dict[str, Any]:
        kept = ("model", "loss_reduction", "needs", "leaves", "accounts", "hooks", "batch_norms")
        return {key: getattr(self, key) for key in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy has seen nothing yet, and registers its own parameters when it is used."""
        self.__dict__.update(state)
        self._begin()

    def _walk(self, module: nn.Module, prefix: str, visited: set[int]) -> None:
        if id(module) in visited:
            return
        visited.add(id(module))
        checked(prefix, refuse_coupling, module)
        parametrized = parametrize.is_parametrized(module)
        if parametrized or any(p is not None for p in module._parameters.values()):
            rule = None if parametrized else find(module)
            if rule is not None or any(p.requires_grad for p in module.parameters()):
                self._add(module, prefix, rule)
            return
        for name, child in module.named_children():
            self._walk(child, f"{prefix}.{name}" if prefix else name, visited)

    def _add(self, module: nn.Module, prefix: str, rule: type[Rule] | None) -> None:
        if any(LEAF in child.__dict__ for child in module.modules()):
            raise GradstatsError(
                f"module '{prefix}' is attached already: use gradstats.attached(model), or detach() it first"
            )
        checked(prefix, fallback.check if rule is None else rule.check, module)
        parameters = dict(module.named_parameters(recurse=rule is None))
        leaf = Leaf(self, module, prefix, rule, tuple(parameters))
        known = {id(p): name for name, p in self.parameters().items()}
        for name, p in parameters.items():
            full = leaf.accounts[name].name
            if isinstance(p, UninitializedParameter):
                raise CoverageError(f"parameter '{full}' is not initialised: call the model once before attach")
            if p.is_complex():
                raise CoverageError(f"parameter '{full}' is complex: rules and squares are for real parameters")
            if id(p) in known and p.requires_grad:
                raise CoverageError(
                    f"parameter '{full}' {tuple(p.shape)} is shared with '{known[id(p)]}': their contributions must be "
                    f"summed per example before squaring. attach(model, engine='vmap') does so for models that vmap."
                )
            self.accounts[full] = leaf.accounts[name]
        swap(module, leaf)
        self.leaves.append(leaf)

    def detach(self) -> None:
        super().detach()
        for hook in self.hooks:
            hook.remove()
        for account in self.accounts.values():
            account.close()
        for leaf in self.leaves:
            unswap(leaf.module)
        self.leaves, self.accounts = [], {}

    def parameters(self) -> dict[str, nn.Parameter]:
        return {name: account.parameter for name, account in self.accounts.items() if account.present}

    def sums(self, name: str, needs: Sequence[str]) -> tuple[dict[str, Tensor], int]:
        account, found = self.accounts[name], {}
        for need in needs:
            value = account.value(need)
            if value is None:
                raise MissingStatistic(
                    f"parameter '{name}' has no statistics: no backward pass has reached it since they were last "
                    f"zeroed. Call loss.backward() on the attached model first (torch.autograd.grad leaves none)."
                )
            found[need] = value
        return found, account.batch_size

    def untouched(self, name: str) -> bool:
        return self.accounts[name].untouched

    def has(self, name: str) -> bool:
        return bool(self.accounts[name].generations)

    @property
    def batch_size(self) -> int:
        return sum(self.lifetime.sizes.values())

    def coverage(self) -> str:
        return table((a.name, a.parameter, leaf.served_by) for leaf in self.leaves for a in leaf.accounts.values())

    def new_examples(self) -> None:
        self.lifetime.new_examples()

    def zero(self) -> None:
        self.lifetime.zero()
