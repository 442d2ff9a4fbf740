"""What `attach` returns, whatever the engine: statistics by name, read from raw sums that an engine gathers."""

from __future__ import annotations

import difflib
import weakref
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from gradstats.clipping import clip, recognise
from gradstats.distributed.counts import Counts
from gradstats.distributed.exchange import Exchange, active, enlist, exchange_of
from gradstats.errors import GradstatsError, LifetimeError, MissingStatistic
from gradstats.gradient import Left, fresh, state_of
from gradstats.loss_scale import LossScale, includes
from gradstats.losses import reduced
from gradstats.reading import Readable, keys
from gradstats.statistics import STATISTICS, Wanted, statistic_of
from gradstats.sums import SUMS, register
from gradstats.window import Reading, Statistic, Window

LOSS_REDUCTIONS = ("mean", "sum")
GRANULARITIES = ("example", "token", "microbatch")

# Reads the windows of one parameter after another, given by name, itself and p.grad.
Reader = Callable[[str, Tensor, Tensor | None], Reading]

# From a parameter to the handle that keeps its statistics; weak on both sides.
_handles: WeakIdKeyDictionary = WeakIdKeyDictionary()


def handle_of(parameter: Tensor) -> Handle | None:
    """The handle attached to the model that owns `parameter`; how optimizers find the statistics."""
    reference = _handles.get(parameter)
    return None if reference is None else reference()


class Handle(Readable):
    """Statistics of the per-example gradients of one model. Made by `gradstats.attach`; a context manager detaches."""

    counts_early: ClassVar[bool] = True  # within a backward pass it is known how many examples that goes through

    def __init__(
        self,
        model: nn.Module,
        statistics: Sequence[Wanted],
        loss_reduction: str,
        granularity: str = "example",
        microbatch_size: int | None = None,
    ):
        if loss_reduction not in LOSS_REDUCTIONS:
            raise GradstatsError(f"loss_reduction must be one of {LOSS_REDUCTIONS}, not {loss_reduction!r}")
        if granularity not in GRANULARITIES:
            raise GradstatsError(f"granularity must be one of {GRANULARITIES}, not {granularity!r}")
        if (granularity == "microbatch") != (microbatch_size is not None):
            raise GradstatsError("microbatch_size goes with granularity='microbatch', and only with it")
        self.model = model
        self.loss_reduction = loss_reduction
        self.granularity, self.microbatch_size = granularity, microbatch_size
        self.statistics: dict[str, Statistic] = {}
        for statistic in map(statistic_of, statistics):
            known = self.statistics.setdefault(statistic.name, statistic)
            if type(known) is not type(statistic) or keys(known) != keys(statistic):
                raise GradstatsError(f"two statistics are called {statistic.name!r}: give one of them another name")
        self.needs_gradient = any(statistic.needs_gradient for statistic in self.statistics.values())
        raws = [raw for statistic in self.statistics.values() for raw in statistic.needs]
        self.needs = tuple(dict.fromkeys(register(raw) for raw in raws))
        self.additive = tuple(need for need in self.needs if SUMS[need].persistent)
        self.others = tuple(need for need in self.needs if not SUMS[need].persistent)
        self.exchange: Exchange | None = None  # with other processes
        self.number = 0  # of all handles of this process
        enlist(self)
        self.loss_scale: LossScale | None = None
        self.follows_clipping = False
        self.statistics_dtype: torch.dtype | None = None
        self._names: dict[int, str] = {}  # id of a registered parameter -> its full name

    # What an engine provides

    @abstractmethod
    def parameters(self) -> dict[str, nn.Parameter]:
        """The model's parameters that the engine serves, by full name."""

    def parameter(self, name: str) -> nn.Parameter | None:
        """One of them, if there is one of that name; what optimizers ask for at every step, parameter by parameter."""
        return self.parameters().get(name)

    @abstractmethod
    def sums(self, name: str, needs: Sequence[str]) -> tuple[dict[str, Tensor], int]:
        """Raw sums of one parameter since its gradient was last None, and how many examples they are over.

        Raises: MissingStatistic if there are none.
        """

    @abstractmethod
    def left(self, name: str) -> Left | None:
        """p.grad as the last backward pass left it; made by `note`."""

    @abstractmethod
    def has(self, name: str) -> bool:
        """Whether a parameter has statistics."""

    def averaged(self, name: str) -> float:
        """Over how many ranks p.grad and the sums of one parameter are; 1 in one process."""
        return 1

    @property
    def gathered(self) -> bool:
        """Whether the window has statistics: something was backpropagated, and it is one of those that are gathered
        (`attach(..., every=k)`)."""
        return self.batch_size > 0

    @property
    def every(self) -> int:
        """k, if every k-th window is gathered."""
        return 1

    @property
    def fraction(self) -> float:
        """The part of a window's examples that statistics are of."""
        return 1.0

    @property
    def sampled(self) -> bool:
        """Whether statistics are of a part of what is seen."""
        return self.every > 1 or self.fraction < 1

    def skipped(self, name: str) -> bool:
        """Whether what was backpropagated through a parameter in this window was not gathered."""
        return False

    @property
    @abstractmethod
    def batch_size(self) -> int:
        """B: examples backpropagated since the gradients were last None."""

    @abstractmethod
    def coverage(self) -> str:
        """A table: parameter, shape, and what serves it."""

    def probe(self, *args: Any, **kwargs: Any) -> None:
        """Looks at one call of the model ahead of the first step; for engines that take the forward as it is, there is
        nothing to find."""

    def backward(self, losses: Tensor) -> Tensor:
        """Backpropagates losses (B,), one an example, as loss_reduction says, and returns their mean or sum (). Engine
        "random_sign" needs it; with the others it is the same as backpropagating that.

        Raises: GradstatsError for losses that are not one an example.
        """
        loss = reduced(losses, self.loss_reduction)
        loss.backward()
        return loss.detach()

    @abstractmethod
    def new_examples(self) -> None:
        """Declares that the forwards from here on see other examples than those before, although no backward came
        between."""

    @abstractmethod
    def zero(self) -> None:
        """Forgets all statistics."""

    def detach(self) -> None:
        """Leaves the model as it was before `attach`."""
        for parameter in self.parameters().values():
            if handle_of(parameter) is self:
                _handles.pop(parameter)
        self._names.clear()
        self.exchange = None
        if self.loss_scale is not None:
            self.loss_scale.close()

    def follow(self, grad_scaler: Any) -> None:
        """Statistics are those of the loss before `grad_scaler` multiplied it, from the next backward pass on."""
        self.loss_scale = LossScale(grad_scaler)
        for p in self.parameters().values():
            if p.requires_grad:
                self.loss_scale.follow(p)

    def note(self, gradient: Tensor) -> Left:
        """What is kept of p.grad after a backward pass."""
        sampled = self.needs_gradient and self.loss_scale is None  # read too, so that every change must be noticed
        return Left(gradient, sampled, self.follows_clipping)

    def note_average(self, parameter: Tensor, begins: bool) -> Left:
        """The same once ranks have averaged p.grad; `begins`: which is the first of its window on this one."""
        assert parameter.grad is not None
        if self.loss_scale is not None:
            self.loss_scale.averaged(parameter, parameter.grad, begins)
        return self.note(parameter.grad)

    def __repr__(self) -> str:
        asked = [*self.statistics]
        asked += [f"every={self.every}"] if self.every > 1 else []
        asked += [f"fraction={self.fraction:g}"] if self.fraction < 1 else []
        asked += [f"statistics_dtype={self.statistics_dtype}"] if self.statistics_dtype is not None else []
        return f"{type(self).__name__}({type(self.model).__name__}: {', '.join(asked)}; batch_size={self.batch_size})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    # With other processes

    def look_around(self) -> Exchange | None:
        """In every forward: is it one of a DistributedDataParallel, whose ranks put their statistics together?"""
        ddp = active()
        if ddp is None:
            return None
        exchange = exchange_of(ddp)
        exchange.adopt()
        exchange.expect(ddp)
        return self.exchange  # that of another DDP, or none, for a model that merely runs inside of this one

    def unsent(self, name: str, kind: str) -> Tensor | None:
        """A raw sum over what other ranks have not been told of yet, None if there is none. Engines that work with
        DistributedDataParallel have this and the next four."""
        raise GradstatsError(f"{type(self).__name__} does not exchange statistics between ranks")

    def unsent_count(self, name: str) -> int:
        """How many of what is counted as one that sum is over."""
        raise GradstatsError(f"{type(self).__name__} does not exchange statistics between ranks")

    def unsent_examples(self) -> tuple[int, int, bool]:
        """Examples that other ranks have not been told of, in how many backward passes (or forwards that these went
        through), and whether their sums are gathered."""
        raise GradstatsError(f"{type(self).__name__} does not exchange statistics between ranks")

    def receive(self, ranks: int, counts: Counts, found: dict[tuple[str, str], Tensor]) -> None:
        """Takes over what all ranks had not told of: counts, and sums by parameter and key. p.grad is their average."""
        raise GradstatsError(f"{type(self).__name__} does not exchange statistics between ranks")

    def note_again(self) -> None:
        """A backward pass is over: gradients are as it left them, although those that are views of one bucket share a
        version, which what was accumulated into the others has changed since."""
        raise GradstatsError(f"{type(self).__name__} does not exchange statistics between ranks")

    # Clipping

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Clips the norm of the gradient over all attached parameters as torch.nn.utils.clip_grad_norm_ does, and with
        it every statistic, p.grad <- f p.grad and g_b <- f g_b with f = min(1, max_norm / (norm + 1e-6)).

        Returns the norm before. Under a GradScaler, name it (attach's grad_scaler) and call scaler.unscale_ first.
        Raises: LifetimeError for a gradient that was changed since the backward pass, or still carries a loss scale.
        """
        return clip(self, max_norm)

    # Reading

    def register(self, parameter: Tensor, name: str) -> None:
        """Makes `handle_of` find this handle. Raises: GradstatsError if another model's handle has the parameter."""
        other = handle_of(parameter)
        if other is not None and other is not self:
            raise GradstatsError(
                f"parameter '{name}' {tuple(parameter.shape)} belongs to two attached models: their statistics would "
                f"not add up. Attach the module that contains both."
            )
        _handles[parameter] = weakref.ref(self)
        self._names[id(parameter)] = name
        if self.loss_scale is not None and parameter.requires_grad:
            self.loss_scale.follow(parameter)

    def registered(self, parameter: Tensor) -> str | None:
        """The full name of a parameter that is known to be this handle's."""
        known = self._names.get(id(parameter))
        return known if known is not None and self.parameter(known) is parameter else None  # ids are given again

    def name_of(self, key: str | Tensor) -> str:
        """The full name of a parameter given by name or by itself. Raises: MissingStatistic."""
        if isinstance(key, str):
            if self.parameter(key) is not None:
                return key
            if not self.parameters():
                raise MissingStatistic(
                    "this handle is detached: its statistics are gone. attach(model) gives a new one"
                )
            if (alias := self.alias_of(key)) is not None:
                return alias
            near = difflib.get_close_matches(key, self.parameters(), n=3)
            hint = f"did you mean {near}?" if near else f"it has {list(self.parameters())[:10]}"
            raise MissingStatistic(f"no parameter '{key}' in the attached model: {hint}")
        if (known := self.registered(key)) is not None:
            return known
        for name, p in self.parameters().items():
            if p is key:
                return name
        raise MissingStatistic(f"a parameter of shape {tuple(key.shape)} does not belong to the attached model")

    def alias_of(self, name: str) -> str | None:
        """The name under which a parameter is known that the model has under several, as tied weights."""
        try:
            parameter = self.model.get_parameter(name)
        except AttributeError:
            return None
        return next((own for own, p in self.parameters().items() if p is parameter), None)

    def window(self, key: str | Tensor, needs: Sequence[str], needs_gradient: bool = False) -> Window:
        """What was backpropagated through one parameter since its gradient was last None, in units of the loss that
        was: a GradScaler's scale included.

        Raises: MissingStatistic if nothing was, or if the sums were not asked for; LifetimeError if the mean gradient
        is needed and p.grad was changed since the backward pass.
        """
        name = self.name_of(key)
        parameter = self.parameter(name) if isinstance(key, str) else key
        assert parameter is not None
        sums, gradient, common = self.reader(needs, needs_gradient)(name, parameter, None)
        return Window(sums, gradient, *common, elements=parameter.numel())

    def reader(self, needs: Sequence[str], needs_gradient: bool = False) -> Reader:
        """The same window of one parameter after another; what optimizers read at every step. Of a p.grad that is
        given it raises, beside that: MissingStatistic if it is another tensor than the last backward pass left."""
        for need in needs:
            if need not in self.needs:
                names = [name for name, entry in STATISTICS.items() if need in keys(entry())]
                way_out = f"attach(model, {names[0]!r}, ...)" if names else "give its statistic to attach"
                raise MissingStatistic(f"{(names or [need])[0]!r} was not collected: {way_out}")
        multiplied = bool(needs) or needs_gradient
        reduction, fraction = self.loss_reduction, self.fraction

        def read(name: str, parameter: Tensor, gradient: Tensor | None) -> Reading:
            sums, size = self.sums(name, needs)
            left = self.left(name)
            if gradient is not None and left is not None and left.tensor() is not gradient:
                raise MissingStatistic(
                    f"the gradient of '{name}' is another tensor than the one that its statistics are of: "
                    f"backpropagate through the attached model before every step"
                )
            factor = 1.0
            if multiplied and left is not None and (self.follows_clipping or left.factor != 1.0):
                factor = self.factor(name, parameter)
            mean = parameter.grad if needs_gradient else None
            if mean is not None and (left is None or not left.fits(mean)):
                raise LifetimeError(
                    f"the gradient of '{name}' was changed in place after the backward pass (clipping, unscaling), so "
                    f"it no longer fits the squares. Clip with the optimizer's max_norm or "
                    f"stats.clip_grad_norm_(max_norm); where a trainer clips, attach(..., follow_clipping=True); name "
                    f"a GradScaler, attach(..., grad_scaler=scaler); or read this statistic before."
                )
            if mean is not None and mean.requires_grad:  # of backward(create_graph=True)
                mean = mean.detach()
            return sums, mean, (size, reduction, 1.0, 1.0, factor, fraction, self.averaged(name))

        return read

    def replaced(self, name: str, gradient: Tensor) -> bool:
        """Whether p.grad is another tensor than the last backward pass left."""
        left = self.left(name)
        return left is not None and left.tensor() is not gradient

    def zeroed(self) -> bool:
        """Whether all gradients were zeroed in place since the last backward pass, so that there is no batch. Waits for
        the device if they were changed."""
        noted = False
        for name in self._names.values():
            p = self.parameter(name)
            if p is not None and p.grad is not None and self.has(name):
                noted, left = True, self.left(name)
                known = left is not None and left.tensor() is p.grad and left.known == state_of(p.grad)
                if left is None or not fresh(p.grad, known):
                    return False
        return noted

    def factor(self, name: str, parameter: Tensor) -> float:
        """By what p.grad was multiplied since the backward pass: 1, unless that was said or is followed.

        Raises: LifetimeError if it cannot be told.
        """
        left = self.left(name)
        if left is None:
            return 1.0
        if self.follows_clipping:
            if not left.fits(parameter.grad):
                if parameter.grad is not None:
                    recognise(self)
            elif left.factor is None:
                left.factor = 1.0
        if left.factor is None:
            raise LifetimeError(
                f"the gradient of '{name}' was zeroed before anything was read, so that it cannot be told whether it "
                f"was clipped. Read statistics, or step with an optimizer of gradstats, before zero_grad()"
            )
        return left.factor

    def without_loss_scale(self, key: str | Tensor, window: Window, unscaled: bool = False) -> Window:
        """The same in units of the loss before the grad_scaler given to `attach` multiplied it. `unscaled`: p.grad is
        known to be in these units already. Raises: LifetimeError if there is no one scale."""
        if self.loss_scale is None:
            return window
        name = self.name_of(key)
        parameter = self.parameter(name)
        assert parameter is not None
        scale = of_gradient = self.loss_scale.of_squares(name, parameter)
        if unscaled:
            if window.factor != 1:
                return window  # its factor brings sums to these units
            of_gradient = 1.0
        elif window.gradient is not None:
            of_gradient = self.loss_scale.of_gradient(name, parameter, window.factor)
        if of_gradient == scale and includes(window.factor, scale):
            return window
        return window._replace(loss_scale=scale, gradient_scale=of_gradient)
