"""One all-reduce for gradients and statistics: what the ranks of one DistributedDataParallel send each other.

A communication hook appends to every bucket of gradients the raw sums of its parameters, and to the last one how many
examples every rank had. What does not go with the gradients follows when the backward pass is over: in one all-reduce,
sums in another dtype than the gradient's, those that are not gathered in every window, and all of them where DDP has a
hook of the user's or the model is compiled; in one all-gather, what is not a sum over examples (norms, maxima).

The hook does not wait for shadows: autograd may accumulate a gradient before the statistic that was returned with it,
so that leaves of such a model hand their sums over as they return them.
"""

from __future__ import annotations

import warnings
import weakref
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.variable import Variable
from torch.nn.parallel import DistributedDataParallel

from gradstats.distributed.counts import Counts
from gradstats.distributed.gathering import Item, gathered
from gradstats.distributed.parcel import Parcel, packed
from gradstats.errors import GradstatsError
from gradstats.sums import SUMS

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
        self._handles: list[weakref.ref[Handle]] = []
        self._owners: dict[int, list[tuple[Handle, str]]] = {}  # by parameter
        self._parcels: list[Parcel] = []  # of the backward pass under way, in the order of its buckets
        self._due = False  # that pass averages gradients
        self._warned = False
        self.rides = True  # sums can go with the gradients
        try:
            ddp.register_comm_hook(self, average)
        except RuntimeError:  # the user has registered one
            self._hooked = False
        else:
            self._hooked = True

    def add(self, handle: Handle) -> None:
        """One attached model more. Raises: GradstatsError for statistics that ranks cannot put together."""
        for statistic in handle.statistics.values():
            if any(raw.per == "pair" for raw in statistic.needs):
                raise GradstatsError(
                    f"{statistic.name!r} pairs the examples of all {self.ranks} ranks, and no rank has the gradients "
                    f"of another's: attach without it, or use 'projection', whose inner products estimate it"
                )
        self._handles.append(weakref.ref(handle))

    def expect(self, ddp: DistributedDataParallel) -> None:
        """A forward is under way: DDP decides by it whether the backward pass averages gradients."""
        if not self._hooked and ddp.require_backward_grad_sync:
            self._due = True

    @property
    def handles(self) -> list[Handle]:
        return [handle for reference in self._handles if (handle := reference()) is not None]

    def names(self, handle: Handle) -> list[str]:
        """The parameters of a handle whose gradients DDP averages."""
        return [name for name, p in handle.parameters().items() if id(p) in self._averaged]

    # In the backward pass

    def average(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """What DDP does with a bucket, (1/W) sum_r of its gradients; and the sums over ranks of what goes along."""
        if bucket.index() == 0:
            self._parcels, self._owners = [], {}
            for handle in self.handles:
                for name in self.names(handle):
                    self._owners.setdefault(id(handle.parameter(name)), []).append((handle, name))
        gradient = bucket.buffer().div_(self.ranks)
        along = self._along(bucket) if self.rides and not gradient.is_sparse else {}
        parcel = packed(along, before=gradient) if along else Parcel(gradient, {}, gradient.numel())
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
        dtype = bucket.buffer().dtype
        for p in bucket.parameters():
            for handle, name in self._owners.get(id(p), ()):
                if handle.every == 1:
                    kinds = [kind for kind in handle.additive if SUMS[kind].dtype(p.dtype) == dtype]
                    along |= {Slot(handle, name, kind): unsent(handle, name, kind) for kind in kinds}
        if bucket.is_last():
            along |= {Slot(handle): self._counts(handle) for handle in self.handles}
        return along

    def _counts(self, handle: Handle) -> Tensor:
        return Counts.table(handle, self.names(handle), self.rank, self.ranks)

    # After it

    def ended(self) -> None:
        """A backward pass has ended, but for what others do at its end: DDP writes the gradients then."""
        if self._due:
            Variable._execution_engine.queue_callback(self.settle)

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
        late = {Slot(handle): self._counts(handle) for handle in handles if Slot(handle) not in found}
        late |= self._sums([handle for handle in handles if handle.every == 1], found)
        found |= self._reduced(late)
        counts = {handle: Counts.of(found.pop(Slot(handle)), self.names(handle), self.rank) for handle in handles}
        gathers = [handle for handle in handles if counts[handle].any_gathers]
        found |= self._reduced(self._sums(gathers, found))
        found |= self._gathered(gathers, counts)
        for handle in handles:
            self._warn(handle, counts[handle])
            handle.receive(
                self.ranks, counts[handle], {(s.name, s.kind): v for s, v in found.items() if s.handle is handle}
            )

    def _sums(self, handles: list[Handle], found: dict[Slot, Tensor]) -> dict[Slot, Tensor]:
        """Sums over examples that have not gone with the gradients."""
        slots = [
            Slot(handle, name, kind) for handle in handles for name in self.names(handle) for kind in handle.additive
        ]
        return {slot: unsent(*slot) for slot in slots if slot not in found}

    def _reduced(self, contents: dict[Slot, Tensor]) -> dict[Slot, Tensor]:
        """Summed over ranks."""
        if not contents:
            return {}
        parcel = packed(contents)
        dist.all_reduce(parcel.flat, group=self.group)
        return parcel.opened()

    def _gathered(self, handles: list[Handle], counts: dict[Handle, Counts]) -> dict[Slot, Tensor]:
        items = {}
        for handle in handles:
            for name in self.names(handle):
                p = handle.parameters()[name]
                for kind in handle.others:
                    raw = SUMS[kind]
                    shapes = [raw.shape(count, tuple(p.shape)) for count in counts[handle].counted[name]]
                    mine = handle.unsent(name, kind)
                    items[Slot(handle, name, kind)] = Item(raw, mine, shapes, raw.dtype(p.dtype), p.device)
        return gathered(items, self.group, self.ranks) if items else {}

    def _warn(self, handle: Handle, counts: Counts) -> None:
        """Once, if ranks had unequal numbers of examples of a mean loss."""
        if self._warned or handle.loss_reduction != "mean" or len(set(counts.examples)) == 1:
            return
        self._warned = True
        warnings.warn(
            f"the ranks of DistributedDataParallel backpropagated {', '.join(map(str, counts.examples))} examples, and "
            f"it averages ranks, not examples: gradient and statistics are those of a mean in which an example of a "
            f"smaller batch weighs more, unless rank r multiplies the mean loss over its B_r examples by W B_r / B, "
            f"with W = {self.ranks} ranks and B = {sum(counts.examples)} (the sum of losses over B_r by W / B)",
            stacklevel=2,
        )


def average(exchange: Exchange, bucket):
    """The communication hook: DDP calls it with its state and one bucket."""
    return exchange.average(bucket)


def unsent(handle: Handle, name: str, kind: str) -> Tensor:
    """What a rank adds to a sum, zeros if it has nothing to add."""
    found, p = handle.unsent(name, kind), handle.parameters()[name]
    return torch.zeros_like(p, dtype=SUMS[kind].dtype(p.dtype)) if found is None else found


_exchanges: weakref.WeakKeyDictionary[DistributedDataParallel, Exchange] = weakref.WeakKeyDictionary()


def active() -> DistributedDataParallel | None:
    """The DistributedDataParallel of several ranks whose forward is under way."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    # What torch.compile asks, too: there is no public way to tell.
    ddp = DistributedDataParallel._get_active_ddp_module()
    return ddp if ddp is not None and dist.get_world_size(ddp.process_group) > 1 else None


def exchange_of(ddp: DistributedDataParallel) -> Exchange:
    """The exchange of a DistributedDataParallel, the same for all attached models inside of it."""
    if ddp not in _exchanges:
        _exchanges[ddp] = Exchange(ddp)
    return _exchanges[ddp]
