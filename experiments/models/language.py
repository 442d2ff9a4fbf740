"""A GPT with the initial weights of GPT-2 (Radford et al. 2019, section 2.3).

Normal with a standard deviation of 0.02, divided by sqrt(2 layers) where a layer's output is added to the residual
stream; biases 0. So a tied head begins with small logits, and the loss at the logarithm of the number of words.
"""

from __future__ import annotations

from math import sqrt

from torch import nn

from experiments.errors import UserError
from experiments.gpt import GPT, Block
from experiments.schemas.model import GPTConfig

INITIAL_DEVIATION = 0.02


def gpt(config: GPTConfig, shape: tuple[int, ...], classes: int) -> GPT:
    if config.width % config.heads:
        raise UserError(f"model.heads={config.heads} does not divide model.width={config.width}")
    (positions,) = shape
    model = GPT(classes, config.width, config.layers, config.heads, positions, config.tied, config.checkpoint)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=INITIAL_DEVIATION)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    for block in model.blocks:
        assert isinstance(block, Block)
        for residual in (block.projection, block.mlp[2]):
            assert isinstance(residual, nn.Linear)
            nn.init.normal_(residual.weight, std=INITIAL_DEVIATION / sqrt(2 * config.layers))
    return model
