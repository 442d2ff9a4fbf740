"""Ranks that probe together: a forward of a sharded model gathers its parameters from all ranks, so none may run one
more than the others, whatever its examples look like."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from zlib import crc32

from torch import nn

from gradstats.distributed.sharded import Shards
from gradstats.errors import CoverageError

# What a rank wishes to do; of several wishes, the largest is granted first. From MODULE on, to gather the parameters of
# one module.
DONE, FORWARD, MODULE = range(3)
FAILED = 2**31


class FailedElsewhere(CoverageError):
    """Another rank's probe has raised an error."""


class Lockstep:
    """One probe of this rank among those of all. `idle` runs a forward for the sake of others."""

    def __init__(self, shards: Shards, idle: Callable[[], object]):
        self.shards, self.idle = shards, idle

    def _ask(self, wish: int) -> None:
        """Returns when all ranks do the same for it. Raises: FailedElsewhere."""
        while (granted := self.shards.largest(wish)) != wish:
            if granted == FAILED:
                raise FailedElsewhere("the probe of this model failed on another rank, whose error says why")
            if granted == FORWARD:
                self.idle()
            else:
                module = self.shards.modules[granted - MODULE]
                module.unshard()
                module.reshard()

    def forward(self) -> None:
        """This rank is about to run one."""
        self._ask(FORWARD)

    @contextmanager
    def gathered(self, inner: nn.Module, under_way: nn.Module | None) -> Iterator[None]:
        """Inside, `inner` has its parameters, as in a forward of the module that they are sharded with."""
        around = [i for i, module in enumerate(self.shards.modules) if inner in set(module.modules())]
        index = around[-1]
        module = self.shards.modules[index]
        if module is under_way:
            yield
            return
        self._ask(MODULE + index)
        module.unshard()
        try:
            yield
        finally:
            module.reshard()

    @contextmanager
    def around(self, found: Callable[[], str]) -> Iterator[None]:
        """Around the probe; `found` names what must not differ between ranks.

        Raises: FailedElsewhere; CoverageError if the ranks have found different things.
        """
        try:
            yield
        except FailedElsewhere:
            raise
        except Exception:  # of any kind: the other ranks wait for an answer
            self.shards.largest(FAILED)
            raise
        self._ask(DONE)
        number = crc32(found().encode())
        if self.shards.largest(number) != -self.shards.largest(-number):
            raise CoverageError(
                f"the probe of this model has found different layers on different ranks; on this one, {found()}. Call "
                f"stats.probe(*batch) with the same batch on all ranks before the first step"
            )
