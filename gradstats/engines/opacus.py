"""Engine "opacus": per-example gradients from Opacus' hooks, written by others from other formulas.

Opacus keeps p.grad_sample (B, *shape), a list of them after several backward passes; with its loss_reduction "sum" they
are the contributions c_b. It captures in training mode only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradstats.arguments import ExampleDims
from gradstats.contribution import Contribution
from gradstats.coverage import table
from gradstats.distributed.exchange import active
from gradstats.errors import CoverageError, GradstatsError, LifetimeError, MissingStatistic
from gradstats.forms.dense import Dense
from gradstats.gradient import Left, fresh, untouched
from gradstats.handle import Handle, handle_of
from gradstats.rules.registry import checked, refuse_coupling


class OpacusHandle(Handle):
    """Reads p.grad_sample."""

    def __init__(
        self,
        model: nn.Module,
        statistics: Sequence[Any],
        loss_reduction: str,
        ignore: Sequence[str] = (),
        example_dims: ExampleDims = 0,
        granularity: str = "example",
        microbatch_size: int | None = None,
    ):
        super().__init__(model, statistics, loss_reduction, granularity, microbatch_size)
        if ignore or example_dims != 0:
            raise GradstatsError("engine 'opacus' knows neither ignore nor example_dims: use engine='fused'")
        if granularity == "token":
            raise GradstatsError("engine 'opacus' has no positions: use granularity='example' or engine='fused'")
        try:
            from opacus.grad_sample.grad_sample_module import GradSampleHooks
        except ImportError as error:
            raise GradstatsError("engine 'opacus' needs Opacus: pip install 'gradstats[opacus]'") from error
        for name, module in model.named_modules():
            checked(name, refuse_coupling, module)
            if isinstance(module, nn.RNNBase | nn.MultiheadAttention):
                raise CoverageError(
                    f"module '{name}' ({type(module).__name__}): Opacus has no per-example gradients of it. Use "
                    f"engine='fused'"
                )
        if any(handle_of(p) is not None for p in model.parameters()):
            raise GradstatsError("the model is attached already: use gradstats.attached(model), or detach() it first")
        try:
            self.samples = GradSampleHooks(model, loss_reduction="sum")
        except NotImplementedError as error:
            raise CoverageError(f"Opacus does not cover this model: {error}") from error
        self.hooks: list[Any] = [model.register_forward_pre_hook(self._refuse_evaluation)]
        self._passes: dict[str, int] = {}  # backward passes since the gradient was last None
        self._left: dict[str, Left] = {}  # p.grad when it was last accumulated
        self._unseen: set[str] = set()  # whose gradient was changed between two backward passes
        for name, p in self.parameters().items():
            self.register(p, name)
            if p.requires_grad:
                self.hooks.append(p.register_hook(lambda g, name=name, p=p: self._count(name, p)))
                self.hooks.append(p.register_post_accumulate_grad_hook(lambda p, name=name: self._remember(name, p)))

    def _refuse_evaluation(self, model: nn.Module, args: tuple) -> None:
        if active() is not None:
            raise CoverageError(
                "Opacus knows the gradients of this rank's examples, and DistributedDataParallel averages those of "
                "all ranks: use engine='fused'"
            )
        if torch.is_grad_enabled() and not model.training:
            raise CoverageError(
                "Opacus captures in training mode only: call model.train(), torch.no_grad(), or use engine='fused'"
            )

    def _count(self, name: str, p: nn.Parameter) -> None:
        known = untouched(p.grad, self._left.get(name))
        if fresh(p.grad, known):
            self._passes[name] = 0
            self._unseen.discard(name)
        elif not known:
            self._unseen.add(name)
        self._passes[name] = self._passes.get(name, 0) + 1

    def _remember(self, name: str, p: Tensor) -> None:
        if p.grad is not None:
            self._left[name] = self.note(p.grad)

    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters())

    def sums(self, name: str, needs: Sequence[str]) -> tuple[dict[str, Tensor], int]:
        parts = self._parts(name)
        if parts is None:
            raise MissingStatistic(f"parameter '{name}' has no statistics: call loss.backward() first")
        if name in self._unseen:
            raise LifetimeError(
                f"the gradient of '{name}' was changed between two backward passes: its statistics are no longer those "
                f"of one gradient. Clip after the last of them, and call zero_grad() before the first"
            )
        contribution: Contribution = Dense(torch.cat(parts))
        if contribution.count != self.batch_size:
            raise CoverageError(
                f"Opacus gives parameter '{name}' {contribution.shape} gradients of {contribution.count} examples, "
                f"where the batch has {self.batch_size}: its input is shared by all, or some skip it. Use "
                f"engine='fused'"
            )
        contribution.parameter = name
        contribution = contribution.regroup(self.granularity, self.microbatch_size)
        return contribution.sums(needs)[1], contribution.count

    def _parts(self, name: str) -> list[Tensor] | None:
        """Gradients (n, *shape) by backward pass. Entries older than the gradient are of windows that zero_grad() has
        ended; Opacus never clears them."""
        p = self.parameters()[name]
        samples = getattr(p, "grad_sample", None)
        if samples is None:
            return None
        parts = (samples if isinstance(samples, list) else [samples])[-self._passes[name] :]
        p.grad_sample = parts  # type: ignore[attr-defined]
        return parts

    def left(self, name: str) -> Left | None:
        return self._left.get(name)

    def has(self, name: str) -> bool:
        return getattr(self.parameters()[name], "grad_sample", None) is not None

    @property
    def batch_size(self) -> int:
        found = (self._parts(name) for name in self._passes)
        return max((sum(map(len, parts)) for parts in found if parts is not None), default=0)

    def coverage(self) -> str:
        return table((name, p, None, "Opacus", "") for name, p in self.parameters().items())

    def new_examples(self) -> None:
        raise GradstatsError("engine 'opacus' cannot hold two forwards in flight: use engine='fused'")

    def zero(self) -> None:
        for p in self.model.parameters():
            p.grad_sample = None  # type: ignore[attr-defined]

    def detach(self) -> None:
        super().detach()
        for hook in self.hooks:
            hook.remove()
        self.samples.cleanup()

    def __getstate__(self) -> dict[str, Any]:
        raise GradstatsError("a model attached with engine='opacus' cannot be copied: detach() it first")
