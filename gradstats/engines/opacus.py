"""Engine "opacus": per-example gradients from Opacus' hooks, written by others from other formulas.

Opacus keeps p.grad_sample (B, *shape), a list of them after several backward passes; with its loss_reduction "sum" they
are the contributions c_b. It captures in training mode only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gradstats.contribution import Dense
from gradstats.errors import CoverageError, GradstatsError, MissingStatistic
from gradstats.handle import Handle
from gradstats.leaf import Leaf
from gradstats.rules.registry import refuse_coupling
from gradstats.statistics import Window


def refuse_evaluation(model: nn.Module, args: tuple) -> None:
    if torch.is_grad_enabled() and not model.training:
        raise CoverageError(
            "Opacus captures in training mode only: call model.train(), torch.no_grad(), or use engine='fused'"
        )


class OpacusHandle(Handle):
    """A handle that reads p.grad_sample instead of shadows."""

    def install(self, whole: bool = False) -> None:
        try:
            from opacus.grad_sample.grad_sample_module import GradSampleHooks
        except ImportError as error:
            raise GradstatsError("engine 'opacus' needs Opacus: pip install 'gradstats[opacus]'") from error
        for module in self.model.modules():
            refuse_coupling(module)
        parameters = dict(self.model.named_parameters())
        leaf = Leaf(self, self.model, "", None, parameters)
        self.leaves = {name: (leaf, name) for name in parameters}
        self._hooks = None
        self._passes = dict.fromkeys(parameters, 0)  # backward passes since the gradient was last None
        try:
            self._hooks = GradSampleHooks(self.model, loss_reduction="sum")
        except NotImplementedError as error:
            raise CoverageError(f"Opacus does not cover this model: {error}") from error
        self._root_hooks = [self.model.register_forward_pre_hook(refuse_evaluation)]
        for name, p in parameters.items():
            if p.requires_grad:
                leaf.hooks[name] = (p, p.register_hook(lambda g, name=name: self._count(name)))
                self.register(p, name)

    def _count(self, name: str) -> None:
        leaf, _ = self.leaves[name]
        self._passes[name] = 1 if leaf.parameter(name).grad is None else self._passes[name] + 1

    def window(self, key: str | Tensor, needs: Sequence[str], needs_gradient: bool = False) -> Window:
        name = self.name_of(key)
        p = self.leaves[name][0].parameter(name)
        samples = getattr(p, "grad_sample", None)
        if samples is None:
            raise MissingStatistic(f"parameter '{name}' has no statistics: call loss.backward() first")
        # Entries older than the gradient are of windows that zero_grad() has ended; Opacus never clears them.
        parts = (samples if isinstance(samples, list) else [samples])[-self._passes[name] :]
        p.grad_sample = parts  # type: ignore[attr-defined]
        c = torch.cat(parts)
        return Window(Dense(c).sums(needs)[1], p.grad, len(c), self.loss_reduction)

    @property
    def batch_size(self) -> int:
        return self.window(self.names()[0], ()).batch_size

    def zero(self) -> None:
        for p in self.model.parameters():
            p.grad_sample = None  # type: ignore[attr-defined]

    def detach(self) -> None:
        if self._hooks is not None:
            self._hooks.cleanup()
        super().detach()
