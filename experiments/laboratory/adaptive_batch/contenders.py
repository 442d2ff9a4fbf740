"""Who decays what: the learning rate at a fixed batch size, or its noise by a growing batch, or nothing."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from experiments.laboratory.schemas import AdaptiveBatchConfig
from experiments.schemas.run import Decay

KEPT, STEP = "growing batch", "growing batch, constant step"
DECAYS = (Decay.linear, Decay.cosine)


@dataclass(frozen=True)
class Contender:
    """constant_step: lr falls as 1/B, so that the step B lr stays, as a batch that grows in place of a decay has it."""

    smallest: int
    largest: int
    decay: Decay = Decay.none
    constant_step: bool = False

    @property
    def grows(self) -> bool:
        return self.smallest < self.largest


def fixed(decay: Decay, B: int) -> str:
    return f"{'constant' if decay is Decay.none else decay.value}, B = {B}"


def contenders(settings: AdaptiveBatchConfig) -> dict[str, Contender]:
    smallest, largest = settings.smallest, settings.largest
    return {
        **{
            fixed(decay, B): Contender(B, B, decay) for B, decay in product(settings.batch_sizes, (Decay.none, *DECAYS))
        },
        KEPT: Contender(smallest, largest),
        STEP: Contender(smallest, largest, constant_step=True),
    }
