"""Blocks that are computed twice: the same numbers, and less that is kept between forward and backward."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

import gradstats
from experiments.models import build_model
from experiments.schemas.model import GPTConfig, ResNetConfig

IMAGES, IMAGE_CLASSES = torch.randn(4, 3, 8, 8), torch.tensor([1, 0, 2, 2])
TOKENS = torch.randint(11, (4, 9))

MODELS = {
    "resnet": (ResNetConfig("resnet", 8, [2, 1], 4, checkpoint=False), IMAGES, IMAGE_CLASSES),
    "gpt": (GPTConfig("gpt", 16, 3, 2, tied=True, checkpoint=False), TOKENS[:, :-1], TOKENS[:, 1:]),
}


def step(name: str, checkpoint: bool) -> tuple[list[Tensor], list[Tensor], int]:
    """Gradients, second moments, and the bytes that the forward pass kept."""
    config, x, y = MODELS[name]
    torch.manual_seed(0)
    model = build_model(dataclasses.replace(config, checkpoint=checkpoint), x.shape[1:], 11, discrete=name == "gpt")
    statistics = gradstats.attach(model)
    statistics.probe(x)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = F.cross_entropy(model(x).flatten(0, -2), y.flatten())
    size = sum(kept.values())
    loss.backward()
    parameters = list(model.parameters())
    return [p.grad for p in parameters], [statistics.second_moment[p] for p in parameters], size


@pytest.mark.parametrize("name", MODELS)
def test_the_same_numbers_from_less_memory(name: str) -> None:
    *plain, size = step(name, checkpoint=False)
    *checkpointed, smaller = step(name, checkpoint=True)
    for expected, found in zip(plain, checkpointed, strict=True):
        for a, b in zip(expected, found, strict=True):
            torch.testing.assert_close(a, b)
    assert smaller < size / 2
