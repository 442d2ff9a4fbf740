"""One all-reduce for gradients and statistics: what the ranks of one DistributedDataParallel send each other.

A communication hook appends to every bucket of gradients the raw sums of its parameters, and to the last one how many
examples every rank had. What does not go with the gradients follows when the backward pass is over: in one all-reduce,
sums in another dtype than the gradient's, those that are not gathered in every window, and all of them where DDP has a
hook of the user's or the model is compiled; in one all-gather, what is not a sum over examples (norms, maxima).

The hook does not wait for shadows: autograd may accumulate a gradient before the statistic that was returned with it,
so that leaves of such a model hand their sums over as they return them.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Mapping
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.variable import Variable
from torch.nn.parallel import DistributedDataParallel

from gradstats.distributed.counts import Counts
from gradstats.distributed.gathering import Item, gathered
from gradstats.distributed.parcel import Parcel, packed
from gradstats.distributed.unequal import warn_unequal
from gradstats.errors import GradstatsError, LifetimeError
from gradstats.gradient import same_sample, sample
from gradstats.sums import SUMS, accumulation_dtype

if TYPE_CHECKING:
    from gradstats.handle import Handle


class Slot(NamedTuple):
    """A raw sum of one parameter; without a kind, a handle's counts."""

    handle: Handle
    name: str = ""
    kind: str = ""


class Exchange:
    """Of one DistributedDataParallel, for all attached models inside of it."""

    def __init__(self, ddp: DistributedDataParallel):
        self.group = ddp.process_group
        self.ranks, self.rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        own = ddp.module.named_parameters()
        self._averaged = {id(p) for name, p in own if p.requires_grad and name not in ddp.parameters_to_ignore}
        self._parcels: list[Parcel] = []  # of the backward pass under way, in the order of its buckets
        self._due = False  # that pass averages gradients
        self._warned = False
        # Of a bucket, gradients share one version: what is accumulated into one leaves its mark on all of them.
        self.views = ddp.gradient_as_bucket_view
        # Samples of the first gradients that were averaged, until DDP has moved them.
        self._moving: dict[Handle, dict[str, Tensor]] | None = {} if self.views else None
        self._joins = False  # ranks may end earlier than others: torch's Join
        self.rides = True  # sums can go with the gradients
        try:
            ddp.register_comm_hook(self, average)
        except RuntimeError:  # the user has registered one
            self._hooked = False
        else:
            self._hooked = True

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of a DistributedDataParallel has a reducer without hooks, and gets an exchange of its own."""
        return object, ()

    def adopt(self) -> None:
        """Takes in all attached models with a parameter here, and not only those whose forward is reached: ranks must
        agree on what they send. Raises: GradstatsError for statistics that ranks cannot put together."""
        for handle in sorted(_attached, key=lambda handle: handle.number):
            if handle.exchange is not self and self.averaged(handle):
                self._check_statistics(handle)
                handle.exchange = self

    def _check_statistics(self, handle: Handle) -> None:
        for statistic in handle.statistics.values():
            if any(raw.per == "pair" for raw in statistic.needs):
                raise GradstatsError(
                    f"{statistic.name!r} pairs the examples of all {self.ranks} ranks, and no rank has the gradients "
                    f"of another's: attach without it, or use 'projection', whose inner products estimate it"
                )

    def expect(self, ddp: DistributedDataParallel) -> None:
        """A forward is under way: DDP decides by it whether the backward pass averages gradients. Without a hook of
        ours there is nothing else to tell."""
        if self._hooked:
            self._due = False  # of a backward pass that was cut short by an exception
        elif ddp.require_backward_grad_sync:
            self._due = True
        if self._moving and torch.is_grad_enabled():
            self._follow()
        self._joins = ddp._join_config.enable
        if self._joins:
            for handle in self.handles:
                self._check_join(ddp, handle)

    def _follow(self) -> None:
        """In the first forward after gradients were averaged DDP makes its buckets anew, and moves them there."""
        assert self._moving is not None
        for handle, samples in self._moving.items():
            gradients = self._gradients(handle)
            if gradients.keys() == samples.keys() and all(same_sample(gradients[n], samples[n]) for n in samples):
                handle.note_again()
        self._moving = None

    def _check_join(self, ddp: DistributedDataParallel, handle: Handle) -> None:
        """Ranks that have joined take part in what DDP sends, and in nothing else. Raises: GradstatsError."""
        if not ddp._divide_by_initial_world_size:
            raise GradstatsError(
                "torch's Join divides by the number of ranks that are left (divide_by_initial_world_size=False) only "
                "where DDP has no communication hook, and statistics go by one: leave the option away, so that the "
                "losses of all ranks weigh the same in every step"
            )
        narrow = any(accumulation_dtype(p.dtype) != p.dtype for p in self.averaged(handle).values())
        if narrow or handle.others or handle.every > 1 or not (self._hooked and self.rides and handle.counts_early):
            raise GradstatsError(
                "within torch's Join, statistics must go with the gradients: those that are sums over examples "
                "(second_moment, variance), of parameters in float32 or wider, with engine='fused', every=1, without "
                "torch.compile and without a communication hook of one's own. Else give every rank a batch in every "
                "step, empty if need be, and multiply its mean loss by W B_r / B"
            )

    @property
    def handles(self) -> list[Handle]:
        """In the order in which they were attached."""
        return sorted((handle for handle in _attached if handle.exchange is self), key=lambda handle: handle.number)

    def averaged(self, handle: Handle) -> dict[str, nn.Parameter]:
        """The parameters of a handle whose gradients DDP averages."""
        return {name: p for name, p in handle.parameters().items() if id(p) in self._averaged}

    def _gradients(self, handle: Handle) -> dict[str, Tensor]:
        return {name: p.grad for name, p in self.averaged(handle).items() if p.grad is not None}

    # In the backward pass

    @torch.no_grad()
    def average(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """What DDP does with a bucket, (1/W) sum_r of its gradients; and the sums over ranks of what goes along."""
        if bucket.index() == 0:
            self._parcels = []
        gradient = bucket.buffer().div_(self.ranks)
        along = self._along(bucket) if self.rides and not gradient.is_sparse else {}
        parcel = packed(along, before=gradient) if along else Parcel(gradient, {}, 0)
        self._parcels.append(parcel)
        if bucket.is_last():
            self._due = True
            if torch._C._current_graph_task_id() != -1:  # a rank that has joined (torch's Join) has no backward pass
                Variable._execution_engine.queue_callback(self.ended)
        future = dist.all_reduce(parcel.flat, group=self.group, async_op=True).get_future()
        return future.then(lambda done: done.value()[0][: parcel.begin] if along else done.value()[0])

    def _along(self, bucket: dist.GradBucket) -> dict[Slot, Tensor]:
        """What goes with a bucket; the same slots on every rank."""
        along: dict[Slot, Tensor] = {}
        dtype, within = bucket.buffer().dtype, {id(p) for p in bucket.parameters()}
        for handle in self.handles:
            if handle.every == 1:
                members = {name: p for name, p in self.averaged(handle).items() if id(p) in within}
                along |= {slot: value for slot, value in sums(handle, members).items() if value.dtype == dtype}
            if bucket.is_last() and handle.counts_early and torch.promote_types(dtype, torch.float32) == dtype:
                along[Slot(handle)] = self._table(handle)
        return along

    def _table(self, handle: Handle) -> Tensor:
        return Counts.table(handle, self.averaged(handle), self.rank, self.ranks)

    # After it

    def ended(self) -> None:
        """A backward pass has ended, but for what others do at its end: DDP writes the gradients then."""
        if self._due:
            Variable._execution_engine.queue_callback(self.settle)
        elif self.views:
            for handle in self.handles:
                handle.note_again()

    @torch.no_grad()
    def settle(self) -> None:
        """Gradients have been averaged: statistics go with them from here on."""
        if not self._due:
            return
        self._due = False
        found: dict[Slot, Tensor] = {}
        for parcel in self._parcels:
            found |= parcel.opened()
        self._parcels, handles = [], self.handles
        tables = {Slot(handle): self._table(handle) for handle in handles if Slot(handle) not in found}
        found |= self._reduced(tables | self._left([handle for handle in handles if handle.every == 1], found))
        counts = {h: Counts.of(found.pop(Slot(h)), self.averaged(h), self.rank) for h in handles}
        for handle in handles:
            self._check(handle, counts[handle])
        gathering = [handle for handle in handles if any(counts[handle].gathers)]
        found |= self._reduced(self._left(gathering, found))
        found |= self._gathered(gathering, counts)
        for handle in handles:
            own = {(slot.name, slot.kind): value for slot, value in found.items() if slot.handle is handle}
            handle.receive(self.ranks, counts[handle], own)
            if self._moving is not None:
                self._moving[handle] = {name: sample(gradient) for name, gradient in self._gradients(handle).items()}

    def _left(self, handles: Iterable[Handle], found: Collection[Slot]) -> dict[Slot, Tensor]:
        """Sums over examples that have not gone with the gradients."""
        every = {slot: value for handle in handles for slot, value in sums(handle, self.averaged(handle)).items()}
        return {slot: value for slot, value in every.items() if slot not in found}

    def _reduced(self, contents: Mapping[Slot, Tensor]) -> dict[Slot, Tensor]:
        """Summed over ranks."""
        if not contents:
            return {}
        parcel = packed(contents)
        dist.all_reduce(parcel.flat, group=self.group)
        return parcel.opened()

    def _gathered(self, handles: Iterable[Handle], counts: Mapping[Handle, Counts]) -> dict[Slot, Tensor]:
        """What is not a sum over examples, of all ranks."""
        items = {}
        for handle in handles:
            for name, p in self.averaged(handle).items():
                for raw in (SUMS[kind] for kind in handle.others):
                    shapes = [raw.shape(count, tuple(p.shape)) for count in counts[handle].counted[name]]
                    mine = handle.unsent(name, raw.key)
                    items[Slot(handle, name, raw.key)] = Item(raw, mine, shapes, raw.dtype(p.dtype), p.device)
        return gathered(items, self.group, self.ranks) if items else {}

    def _check(self, handle: Handle, counts: Counts) -> None:
        """Warns once, if ranks had unequal numbers of examples of a mean loss. Raises, on all ranks: LifetimeError if
        one has gone through no layer of the model, and so cannot know whether a new window has begun."""
        absent = [rank for rank, passes in enumerate(counts.passes) if passes == 0]
        if absent and not self._joins:
            raise LifetimeError(
                f"the backward pass of rank {absent[0]} went through no layer of the attached "
                f"{type(handle.model).__name__}: attach the whole model, or use it on every rank"
            )
        if self._warned or handle.loss_reduction != "mean" or len(set(counts.examples)) == 1:
            return
        self._warned = True
        warn_unequal("DistributedDataParallel", counts.examples)


def average(exchange: Exchange, bucket):  # DDP refuses annotations that are not evaluated
    """The communication hook: DDP calls it with its state and one bucket."""
    return exchange.average(bucket)


def sums(handle: Handle, parameters: Mapping[str, nn.Parameter]) -> dict[Slot, Tensor]:
    """What a rank adds to the sums over examples: zeros where it has nothing to add."""
    found = {}
    for name, p in parameters.items():
        for kind in handle.additive:
            own = handle.unsent(name, kind)
            found[Slot(handle, name, kind)] = (
                torch.zeros_like(p, dtype=SUMS[kind].dtype(p.dtype)) if own is None else own
            )
    return found


_attached: weakref.WeakSet[Handle] = weakref.WeakSet()
_numbers = count()


def enlist(handle: Handle) -> None:
    """A model is attached, or a copy of one is made."""
    handle.number = next(_numbers)
    _attached.add(handle)


_exchanges: weakref.WeakKeyDictionary[DistributedDataParallel, Exchange] = weakref.WeakKeyDictionary()


def active() -> DistributedDataParallel | None:
    """The DistributedDataParallel of several ranks whose forward is under way."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    # What torch.compile asks too: there is no public way to tell.
    ddp = DistributedDataParallel._get_active_ddp_module()
    return ddp if ddp is not None and dist.get_world_size(ddp.process_group) > 1 else None


def exchange_of(ddp: DistributedDataParallel) -> Exchange:
    """The exchange of a DistributedDataParallel, the same for all attached models inside of it."""
    if ddp not in _exchanges:
        _exchanges[ddp] = Exchange(ddp)
    return _exchanges[ddp]
