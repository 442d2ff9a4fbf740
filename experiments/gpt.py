"""A GPT of any size: pre-norm blocks, learned positions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). `causal`: a position sees itself and those before it."""

    def __init__(self, width: int, heads: int, causal: bool = True):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        n, t, width = x.shape
        heads = self.query_key_value(self.attention_norm(x)).view(n, t, 3, self.heads, -1)
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # (n, heads, t, width / heads) each
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        x = x + self.projection(mixed.transpose(1, 2).reshape(n, t, width))
        return x + self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    """Tokens (n, t) to logits (n, t, words). `tied`: the head's weight is the embedding's. `checkpointed`: of a block
    only its input is kept for the backward pass, which computes the rest again."""

    def __init__(
        self,
        words: int,
        width: int,
        layers: int,
        heads: int,
        positions: int,
        tied: bool = False,
        checkpointed: bool = False,
    ):
        super().__init__()
        self.checkpointed = checkpointed
        self.tokens, self.positions = nn.Embedding(words, width), nn.Embedding(positions, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, words, bias=not tied)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        # (n, t) and not (1, t): Opacus, with which this is compared, would take all examples for one.
        positions = torch.arange(tokens.shape[1], device=tokens.device).repeat(len(tokens), 1)
        x = self.tokens(tokens) + self.positions(positions)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return self.head(self.norm(x))
