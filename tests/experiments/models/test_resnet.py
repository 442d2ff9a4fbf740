from __future__ import annotations

import pytest
import torch

from experiments.errors import UserError
from experiments.models import build_model
from experiments.schemas.model import ModelConfig, ResNetConfig

RESNET18 = ResNetConfig("resnet", 64, [2, 2, 2, 2], 32, checkpoint=False)
SMALL = ResNetConfig("resnet", 8, [1, 2], 4, checkpoint=False)


def test_it_is_resnet18_for_small_images() -> None:
    model = build_model(RESNET18, (3, 32, 32), 10)
    # As many as with BatchNorm, whose layers have a gain and a bias too.
    assert sum(p.numel() for p in model.parameters()) == 11_173_962
    sizes: list[tuple[int, ...]] = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, output: sizes.append(tuple(output.shape[1:])))
    with torch.no_grad():
        model(torch.randn(1, 3, 32, 32))
    assert sizes == [(64, 32, 32)] * 2 + [(128, 16, 16)] * 2 + [(256, 8, 8)] * 2 + [(512, 4, 4)] * 2


def test_a_block_adds_to_what_it_is_given() -> None:
    model = build_model(SMALL, (3, 8, 8), 10)
    x = torch.rand(2, 8, 8, 8)
    block = model.blocks[0]
    torch.nn.init.zeros_(block.norm2.weight)
    assert torch.equal(block(x), x)
    assert model.blocks[1](x).shape == (2, 16, 4, 4)


@pytest.mark.parametrize(
    ("config", "shape", "message"),
    [
        (SMALL, (64,), r"model=resnet needs images, .* shape \(64,\)"),
        (
            ResNetConfig("resnet", 8, [1], 3, checkpoint=False),
            (3, 8, 8),
            "model.groups=3 does not divide model.width=8",
        ),
        (ResNetConfig("resnet", 8, [1, 0], 4, checkpoint=False), (3, 8, 8), r"model.blocks=\[1, 0\] must be positive"),
    ],
)
def test_refuses_what_it_cannot_build(config: ModelConfig, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_model(config, shape, 10)
