"""Random projection of per-example gradients, as data attribution uses it (Park et al., TRAK, arXiv:2303.14186, 3.2).

    r_b = R g_b / sqrt(k)        R (k, P) of independent signs, E <r_a, r_b> = <g_a, g_b>

R is a function of the seed, the parameter's name and the place of the element, so that it is the same in every call,
process and device, and only a few of its columns exist at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from hashlib import blake2b

import torch
from torch import Tensor

from gradstats.errors import GradstatsError
from gradstats.sums import Block
from gradstats.window import BlockStatistic, Window

SIGNS = 2**20  # entries of R formed at a time


@dataclass(frozen=True)
class Projection(BlockStatistic):
    """r_b (B, dimensions), in the order in which the examples were seen; that of the whole gradient is the sum over
    parameters (`.total`). Every element of the parameters costs `dimensions` multiplications an example.

    Inner products are estimated without bias, with a relative error of about sqrt(2 / dimensions) for norms.
    """

    dimensions: int = 512
    seed: int = 0

    name = "projection"
    per = "example"
    ignores_zeros = True

    @property
    def key(self) -> str:
        return f"projection to {self.dimensions} dimensions, seed {self.seed}"

    @property
    def trailing(self) -> tuple[int, ...]:  # type: ignore[override]
        return (self.dimensions,)

    def partial(self, block: Block) -> Tensor:
        if not block.parameter:
            raise GradstatsError("a random projection needs the name of the parameter, or all would share one")
        salt = salt_of(self.seed, block.parameter)
        total = block.c.new_zeros(len(block.c), self.dimensions)
        step = max(1, SIGNS // self.dimensions)
        for c, elements in zip(block.c.split(step, 1), block.elements.split(step), strict=True):
            total.addmm_(c, signs(salt, elements, self.dimensions).to(c.dtype))
        return total

    def read(self, window: Window) -> Tensor:
        return window.sums[self.key] * (window.scale / self.dimensions**0.5)


def salt_of(seed: int, parameter: str) -> int:
    """64 bits that differ by seed and parameter, and not by process as those of `hash` do."""
    digest = blake2b(f"{seed} {parameter}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def signs(salt: int, elements: Tensor, dimensions: int) -> Tensor:
    """Columns of R for the given elements (k,), transposed: (k, dimensions) of -1 and 1.

    Bits of SplitMix64 at counters that are functions of the element (Steele, Lea and Flood, OOPSLA 2014).
    """
    words = -(-dimensions // 64)
    counter = elements.unsqueeze(1) * words + torch.arange(words, device=elements.device)
    x = counter * signed(0x9E3779B97F4A7C15) + salt
    x = (x ^ logical_shift(x, 30)) * signed(0xBF58476D1CE4E5B9)
    x = (x ^ logical_shift(x, 27)) * signed(0x94D049BB133111EB)
    x = x ^ logical_shift(x, 31)
    return signs_of_bytes(x.device)[x.view(torch.uint8).long()].flatten(1)[:, :dimensions]


def signed(x: int) -> int:
    """A 64-bit constant as torch has it."""
    return x - 2**64 if x >= 2**63 else x


def logical_shift(x: Tensor, by: int) -> Tensor:
    return (x >> by) & (2 ** (64 - by) - 1)


@cache
def signs_of_bytes(device: torch.device) -> Tensor:
    """The eight signs that each byte stands for (256, 8): looking them up is cheaper than shifting bits."""
    bits = torch.arange(256, device=device).unsqueeze(1) >> torch.arange(8, device=device)
    return (2 * (bits & 1) - 1).float()
