"""A residual network for small images (He et al. 2016, sections 3.3 and 4.2), with GroupNorm (Wu and He 2018).

Width 64 and blocks [2, 2, 2, 2] are ResNet-18. For images of 32 x 32 its first convolution is 3 x 3 without stride,
and is not followed by a pooling layer.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from experiments.errors import UserError
from experiments.schemas.model import ResNetConfig


class Block(nn.Module):
    """relu(shortcut(x) + norm(conv(relu(norm(conv(x)))))), the first convolution with the stride."""

    def __init__(self, inputs: int, outputs: int, stride: int, groups: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = conv(inputs, outputs, 3, stride), nn.GroupNorm(groups, outputs)
        self.conv2, self.norm2 = conv(outputs, outputs, 3), nn.GroupNorm(groups, outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(conv(inputs, outputs, 1, stride), nn.GroupNorm(groups, outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.shortcut(x) + self.norm2(self.conv2(y)))


class ResNet(nn.Module):
    """`checkpointed`: of a block only its input is kept for the backward pass, which computes the rest again."""

    def __init__(self, channels: int, width: int, blocks: list[int], groups: int, classes: int, checkpointed: bool):
        super().__init__()
        self.checkpointed = checkpointed
        self.stem, self.norm = conv(channels, width, 3), nn.GroupNorm(groups, width)
        stages: list[nn.Module] = []
        inputs = width
        for stage, count in enumerate(blocks):
            outputs = width * 2**stage
            for number in range(count):
                stages.append(Block(inputs, outputs, 2 if stage > 0 and number == 0 else 1, groups))
                inputs = outputs
        self.blocks = nn.ModuleList(stages)
        self.head = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return self.head(x.mean((2, 3)))


def resnet(config: ResNetConfig, shape: tuple[int, ...], classes: int) -> ResNet:
    """Raises UserError for examples that are no images, and groups that do not divide the width."""
    if len(shape) != 3:
        raise UserError(f"model=resnet needs images, and an example here has shape {shape}: choose model=mlp")
    if config.groups < 1 or config.width % config.groups:
        raise UserError(f"model.groups={config.groups} does not divide model.width={config.width}")
    if min([1, *config.blocks]) < 1:
        raise UserError(f"model.blocks={config.blocks} must be positive")
    return ResNet(shape[0], config.width, config.blocks, config.groups, classes, config.checkpoint)


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """Without a bias, which the norm after it would take away."""
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
