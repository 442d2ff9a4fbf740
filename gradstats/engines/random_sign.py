"""Engine "random_sign": a backward pass more, of the examples' losses under random signs, for any model.

`stats.backward(losses)` has the losses of single examples (B,). A backward pass of their mean or sum makes p.grad =
C = sum_b c_b, and k of them before it, of losses under weights w_j that sum to zero, T_j = sum_b w_jb c_b. Elementwise,

    sum_b c_b^2 ~ C^2/B + D^        D^ = (n-1)/(n k) sum_j T_j^2        n the smallest power of two >= B

without bias and never below C^2/B, so that the variance is never negative; exact at k = n - 1. contrasts.py has the
weights and the variance, which for k = 1 is about 2 (D^2 - sum_b d_b^4), d_b the deviations of c_b from their mean and
D = sum_b d_b^2: one batch tells D up to a factor of about 1 +- 1.4 for each element by itself, and averages over
steps, or sums over elements, tell it well.

Nothing is looked into, so that what mixes examples (BatchNorm in training) is served too: c_b is then the gradient of
the loss of example b through the whole batch, its effect on the other examples' statistics included, and not what a
batch without the others would give.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from gradstats.arguments import ExampleDims
from gradstats.engines.contrasts import contrasts
from gradstats.engines.outside import ESTIMATED, OutsideHandle
from gradstats.engines.passes import Pass
from gradstats.errors import GradstatsError, MissingStatistic
from gradstats.losses import reduced
from gradstats.statistics import Wanted
from gradstats.window import Statistic


class RandomSignHandle(OutsideHandle):
    """Weighs the losses that `backward` is given.

    `generator` draws the order of the examples, and nothing else is drawn; on whatever device, since numbers are moved.
    """

    engine = "random_sign"
    call = "stats.backward(losses), with the losses of single examples"
    unseen = (
        "a loss was backpropagated by other means than stats.backward(losses), or it was changed between two of these, "
        "or is older than attach. Call zero_grad() before the first stats.backward, and nothing else between"
    )

    def __init__(
        self,
        model: nn.Module,
        statistics: Sequence[Wanted],
        loss_reduction: str,
        ignore: Sequence[str] = (),
        example_dims: ExampleDims = 0,
        granularity: str = "example",
        microbatch_size: int | None = None,
        probes: int = 1,
        generator: torch.Generator | None = None,
    ):
        if granularity != "example":
            raise GradstatsError(f"engine 'random_sign' has no granularity={granularity!r}: use engine='fused'")
        if example_dims != 0:
            raise GradstatsError("engine 'random_sign' takes examples from the losses (B,): leave example_dims away")
        if type(probes) is not int or probes < 1:
            raise GradstatsError(f"probes is a number of backward passes, at least 1; got {probes!r}")
        super().__init__(model, statistics, loss_reduction, ignore)
        self.probes = probes
        self.generator = generator or torch.Generator().manual_seed(0)
        # Of the call of `backward` under way: its examples, and D^ by parameter and raw sum.
        self._examples = 0
        self._deviations: dict[str, dict[str, Tensor]] = {}

    def check(self, statistic: Statistic) -> None:
        if not isinstance(statistic, ESTIMATED):
            raise GradstatsError(
                f"{statistic.name!r} cannot be estimated without bias from gradients of losses under signs: "
                f"{', '.join(repr(s.name) for s in ESTIMATED)} can. Use engine='fused'"
            )

    # Backward

    def backward(self, losses: Tensor) -> Tensor:
        """Backpropagates losses (B,), one an example, as their mean or sum, and the probes before it.

        p.grad is what that loss () makes, which is returned, and gradients are accumulated once; hooks on tensors and
        modules run in every pass, those of parameters too, and may multiply gradients. Calls between two zero_grad()
        add up; under a GradScaler, scaler.scale(losses). The graph is kept until the last pass, so that checkpoints
        must be those of use_reentrant=False. Raises: GradstatsError for losses that are not one an example.
        """
        if not self.parameters():
            raise MissingStatistic("this handle is detached: attach(model) gives a new one")
        loss = reduced(losses, self.loss_reduction)
        self._passes.begin()
        if all(p.grad is None for p in self.parameters().values()):
            self.zero()  # before there are more
        try:
            self._deviations = self._probe(losses)
            self._examples = len(losses)
            loss.backward(torch.ones_like(loss) + self._overflow(loss.device))
        finally:
            self._examples, self._deviations = 0, {}
        return loss.detach()

    def _probe(self, losses: Tensor) -> dict[str, dict[str, Tensor]]:
        """D^ of the parameters that the losses depend on, by raw sum."""
        weights, factor = contrasts(len(losses), self.probes, self.generator)
        if self.loss_reduction == "mean":
            weights = weights / len(losses)
        found: dict[str, dict[str, Tensor]] = {}
        for w in weights.to(losses.dtype).to(losses.device):
            for name, gradient in self._weighed(losses, w):
                squares = self.of_one(name, gradient)
                total = found.setdefault(name, {})
                for need, square in squares.items():
                    total[need] = total[need].add_(square, alpha=factor) if need in total else square.mul_(factor)
        return found

    def _weighed(self, losses: Tensor, w: Tensor) -> Iterator[tuple[str, Tensor]]:
        """T of the parameters that the losses depend on, by name."""
        trainable = {name: p for name, p in self.parameters().items() if p.requires_grad and p.is_leaf}
        gradients = torch.autograd.grad(losses, list(trainable.values()), w, retain_graph=True, allow_unused=True)
        for name, gradient in zip(trainable, gradients, strict=True):
            if gradient is not None:
                yield name, gradient.to_dense()

    def _overflow(self, device: torch.device) -> Tensor:
        """0, or nan if a probe overflowed: the gradient is then nan too, so that GradScaler, which sees nothing else,
        leaves the step out and lowers its scale. Does not wait for the device."""
        sums = [square.sum().to(device) for squares in self._deviations.values() for square in squares.values()]
        return 0 * torch.stack(sums).sum() if sums else torch.zeros((), device=device)

    def commit(self, ended: Pass) -> None:
        if not self._examples:
            ended.changed.update(ended.arrived)
        super().commit(ended)

    def examples(self, ended: Pass) -> int:
        return self._examples

    def found(self, gradients: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        if not self._examples:
            return {name: {} for name in gradients}
        found: dict[str, dict[str, Tensor]] = {}
        for name, gradient in gradients.items():
            found[name] = self.of_one(name, gradient)
            deviations = self._deviations.pop(name, {})  # let go one by one, as the squares come
            for need, square in found[name].items():
                square.div_(self._examples).add_(deviations.get(need, 0.0))
        return found

    def new_examples(self) -> None:
        """Every call of `backward` is of new examples, whatever the forwards."""

    # Reading

    def sums(self, name: str, needs: Sequence[str]) -> tuple[dict[str, Tensor], int]:
        found, sizes = self.over_passes(name, needs)
        return found, round(sum(sizes))
