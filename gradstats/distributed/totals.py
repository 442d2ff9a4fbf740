"""What the ranks have gathered together, of one parameter since its gradient was last None."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from gradstats.errors import LifetimeError
from gradstats.sums import SUMS


@dataclass
class Totals:
    """Sums over the contributions of all ranks, each in the units of its own rank's loss."""

    ranks: int  # over which DDP averages gradients
    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, found: dict[str, Tensor]) -> None:
        """Those of one exchange more. Examples follow each other by exchange, then by rank."""
        for key, value in found.items():
            self.sums[key] = SUMS[key].joined([self.sums[key], value]) if key in self.sums else value


def unshared(name: str, ranks: int) -> LifetimeError:
    """A gradient that no statistics go with."""
    return LifetimeError(
        f"the gradient of '{name}' is the average of {ranks} ranks and, beside it, this rank's own of a backward pass "
        f"under no_sync(). Read statistics after the next backward pass without it"
    )
