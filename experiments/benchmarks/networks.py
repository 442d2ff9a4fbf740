"""Networks in the shapes that others are measured in; what is no layer of torch.nn, is made of such layers."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from experiments.gpt import Block

GROUPS = 32


def perceptron(*widths: int) -> nn.Sequential:
    """Linear layers between these widths, and ReLU between the layers."""
    layers: list[nn.Module] = []
    for i, o in pairwise(widths):
        layers += [nn.Linear(i, o), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(GROUPS, width), width)


class Residual(nn.Module):
    """ResNet's basic block with GroupNorm for BatchNorm, which mixes examples."""

    def __init__(self, i: int, o: int, stride: int):
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(i, o, 3, stride, padding=1, bias=False),
            norm(o),
            nn.ReLU(),
            nn.Conv2d(o, o, 3, padding=1, bias=False),
            norm(o),
        )
        same = stride == 1 and i == o
        self.shortcut = nn.Identity() if same else nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), norm(o))
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.main(x) + self.shortcut(x))


def resnet18(width: int, classes: int) -> nn.Sequential:
    """Four stages of two blocks; stem of small images, 3 x 3 without pooling."""
    stem = [nn.Conv2d(3, width, 3, padding=1, bias=False), norm(width), nn.ReLU()]
    stages: list[nn.Module] = []
    before = width
    for stage in range(4):
        after = width * 2**stage
        stages += [Residual(before, after, 1 if stage == 0 else 2), Residual(after, after, 1)]
        before = after
    return nn.Sequential(*stem, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))


class Patches(nn.Module):
    """Images to patches, a class token in front, learned positions."""

    def __init__(self, width: int, patch: int, count: int):
        super().__init__()
        self.projection = nn.Conv2d(3, width, patch, patch)
        self.first = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, count + 1, width))

    def forward(self, x: Tensor) -> Tensor:
        patches = self.projection(x).flatten(2).transpose(1, 2)  # (n, count, width)
        return torch.cat([self.first.expand(len(x), -1, -1), patches], dim=1) + self.positions


class ViT(nn.Module):
    """Pre-norm blocks without a mask; the class token is read."""

    def __init__(self, width: int, layers: int, heads: int, size: int, patch: int, classes: int):
        super().__init__()
        self.patches = Patches(width, patch, (size // patch) ** 2)
        self.blocks = nn.Sequential(*(Block(width, heads, causal=False) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.patches(x))[:, 0]))


class BagOfWords(nn.Module):
    """The mean of the words' embeddings, and a small perceptron: nearly all parameters are the embedding's."""

    def __init__(self, words: int, width: int, classes: int):
        super().__init__()
        self.embedding, self.head = nn.Embedding(words, width), perceptron(width, width, classes)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.embedding(words).mean(dim=1))
