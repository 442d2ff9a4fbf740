"""What is trained: a model, a batch and its examples' losses, in the shapes of the table and along four scales."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.benchmarks.networks import BagOfWords, ViT, perceptron, resnet18
from experiments.gpt import GPT, Block

Losses = Callable[[Tensor, Tensor], Tensor]
Made = tuple[nn.Module, Tensor, Tensor, Losses]

WORDS = 50_257  # of GPT-2
CLASSES = 10


@dataclass(frozen=True)
class Settings:
    """Where and how precisely: all but float32 is autocast, with parameters in float32."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    threads: int = 1
    quick: bool = False


@dataclass(frozen=True)
class Problem:
    """The loss is the mean of `losses(model(x), y)`, (B,). The same call makes the same parameters and examples."""

    model: nn.Module
    x: Tensor
    y: Tensor
    losses: Losses
    settings: Settings

    def autocast(self) -> AbstractContextManager[object]:
        dtype = self.settings.dtype
        return nullcontext() if dtype == torch.float32 else torch.autocast(self.x.device.type, dtype)

    def losses_of(self, model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
        with self.autocast():
            return self.losses(model(x), y)

    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters())

    def first(self, rows: int) -> Problem:
        return replace(self, x=self.x[:rows], y=self.y[:rows])

    def double(self) -> Problem:
        """The same in float64."""
        x, y = (t.double() if t.is_floating_point() else t for t in (self.x, self.y))
        return replace(self, model=self.model.double(), x=x, y=y)


@dataclass(frozen=True)
class Workload:
    """`make(**shape)`; `quick` is a shape for a look whether everything runs; `only` contestants that take part, unless
    they are named."""

    title: str
    make: Callable[..., Made]
    shape: dict[str, int]
    quick: dict[str, int] = field(default_factory=dict)
    large: bool = False  # for a GPU, unless it is named
    only: tuple[str, ...] = ()

    def problem(self, settings: Settings) -> Problem:
        torch.manual_seed(0)
        with torch.device(settings.device):
            return Problem(*self.make(**self.shaped(settings)), settings)

    def shaped(self, settings: Settings) -> dict[str, int]:
        return self.shape | (self.quick if settings.quick else {})


def classification(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits, y, reduction="none")


def next_word(logits: Tensor, y: Tensor) -> Tensor:
    """The mean over an example's positions."""
    return F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view_as(y).mean(dim=1)


def regression(output: Tensor, y: Tensor) -> Tensor:
    return (output - y).square().flatten(1).mean(dim=1)


def mlp(B: int, width: int, depth: int = 3) -> Made:
    model = perceptron(784, *[width] * (depth - 1), CLASSES)
    return model, torch.randn(B, 784), torch.randint(0, CLASSES, (B,)), classification


def linear(B: int, T: int, width: int, depth: int = 2) -> Made:
    model = perceptron(*[width] * (depth + 1))
    return model, torch.randn(B, T, width), torch.randn(B, T, width), regression


def resnet(B: int, width: int, size: int) -> Made:
    return resnet18(width, CLASSES), torch.randn(B, 3, size, size), torch.randint(0, CLASSES, (B,)), classification


def gpt(B: int, T: int, width: int, layers: int, heads: int, words: int, tied: int = 0) -> Made:
    tokens = torch.randint(0, words, (B, T + 1))
    return (
        GPT(words, width, layers, heads, T, tied=bool(tied)),
        tokens[:, :-1].contiguous(),
        tokens[:, 1:].contiguous(),
        next_word,
    )


def block(B: int, T: int, width: int, heads: int) -> Made:
    return Block(width, heads), torch.randn(B, T, width), torch.randn(B, T, width), regression


def vit(B: int, width: int, layers: int, heads: int, size: int, patch: int) -> Made:
    model = ViT(width, layers, heads, size, patch, CLASSES)
    return model, torch.randn(B, 3, size, size), torch.randint(0, CLASSES, (B,)), classification


def embedding(B: int, T: int, width: int, words: int) -> Made:
    model = BagOfWords(words, width, CLASSES)
    return model, torch.randint(0, words, (B, T)), torch.randint(0, CLASSES, (B,)), classification


SMALL_GPT = {"B": 2, "T": 4, "width": 8, "layers": 1, "heads": 2, "words": 16}
WORKLOADS = {
    "mlp": Workload("MLP 784-1024-1024-10", mlp, {"B": 256, "width": 1024}, {"B": 8, "width": 16}),
    "resnet18": Workload(
        "ResNet-18, GroupNorm", resnet, {"B": 64, "width": 64, "size": 32}, {"B": 2, "width": 4, "size": 16}
    ),
    "gpt": Workload("GPT", gpt, {"B": 16, "T": 128, "width": 256, "layers": 4, "heads": 4, "words": 256}, SMALL_GPT),
    "gpt2_block": Workload(
        "one block of GPT-2 small", block, {"B": 4, "T": 256, "width": 768, "heads": 12}, {"T": 8, "width": 24}
    ),
    "vit": Workload(
        "ViT",
        vit,
        {"B": 32, "width": 192, "layers": 6, "heads": 3, "size": 32, "patch": 4},
        {"B": 2, "width": 12, "layers": 1, "size": 8},
    ),
    "linear_t4": Workload("two Linear, 4 positions", linear, {"B": 64, "T": 4, "width": 1024}, {"B": 4, "width": 8}),
    "linear_t16": Workload("two Linear, 16 positions", linear, {"B": 64, "T": 16, "width": 1024}, {"B": 4, "width": 8}),
    "embedding": Workload(
        "embedding of 100,000 words",
        embedding,
        {"B": 64, "T": 64, "width": 64, "words": 100_000},
        {"B": 4, "words": 50},
    ),
    "tied_head": Workload(
        "GPT with a tied head of 50,257 words",
        gpt,
        {"B": 4, "T": 128, "width": 256, "layers": 1, "heads": 4, "words": WORDS, "tied": 1},
        SMALL_GPT,
    ),
    # For its memory: a step takes seconds.
    "gpt2_layers": Workload(
        "two layers of GPT-2 small, with its words",
        gpt,
        {"B": 8, "T": 256, "width": 768, "layers": 2, "heads": 12, "words": WORDS, "tied": 1},
        SMALL_GPT,
        only=("plain", "ours-second_moment"),
    ),
    "gpt2_small": Workload(
        "GPT-2 small",
        gpt,
        {"B": 32, "T": 1024, "width": 768, "layers": 12, "heads": 12, "words": WORDS, "tied": 1},
        SMALL_GPT,
        large=True,
    ),
}


@dataclass(frozen=True)
class Scale:
    """One size of a shape, and its values; what it does to the time is read off its slope."""

    title: str
    symbol: str
    values: tuple[int, ...]
    quick: tuple[int, ...]
    make: Callable[..., Made]
    shape: dict[str, int]
    tiny: dict[str, int]

    def points(self, settings: Settings) -> tuple[int, ...]:
        return self.quick if settings.quick else self.values

    def every(self) -> list[int]:
        """Values of any settings."""
        return sorted({*self.values, *self.quick})

    def workload(self, value: int) -> Workload:
        at: dict[str, Any] = {self.symbol: value}
        return Workload(f"{self.title}, {self.symbol} = {value}", self.make, self.shape | at, self.tiny | at)


SCALES = {
    "scale_batch": Scale(
        "MLP 784-1024-1024-10", "B", tuple(2**k for k in range(11)), (2, 4), mlp, {"width": 1024}, {"width": 16}
    ),
    "scale_positions": Scale(
        "two Linear, B = 8",
        "T",
        tuple(2**k for k in range(2, 11)),
        (2, 4),
        linear,
        {"B": 8, "width": 512},
        {"B": 2, "width": 8},
    ),
    "scale_width": Scale(
        "MLP of three layers, B = 64", "width", tuple(2**k for k in range(6, 12)), (8, 16), mlp, {"B": 64}, {"B": 4}
    ),
    "scale_depth": Scale(
        "MLP, B = 64",
        "depth",
        tuple(2**k for k in range(1, 6)),
        (2, 4),
        mlp,
        {"B": 64, "width": 256},
        {"B": 4, "width": 8},
    ),
}


def find(name: str) -> Workload:
    """A workload of the table, or a point of a scale, as `point` calls it."""
    if name in WORKLOADS:
        return WORKLOADS[name]
    scale, _, value = name.partition("=")
    return SCALES[scale].workload(int(value))


def point(scale: str, value: int) -> str:
    return f"{scale}={value}"
