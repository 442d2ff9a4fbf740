"""The table of layers: every row runs through the oracle in float64 and float32, fused and under vmap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

B = 5


class Row(NamedTuple):
    make: Callable[[], nn.Module]
    x: Callable[[], Any]  # a tensor, positional arguments in a tuple, or keyword arguments in a dict


def floats(*shape: int) -> Callable[[], Tensor]:
    """Correlated over positions: an offset common to an example, so that token and example differ."""
    return lambda: torch.randn(B, *shape) + torch.randn(B, *[1] * len(shape))


def ids(*shape: int, top: int = 7) -> Callable[[], Tensor]:
    return lambda: torch.randint(0, top, (B, *shape))


def frozen(module: nn.Module, name: str) -> nn.Module:
    module.get_parameter(name).requires_grad_(False)
    return module


def after(first: nn.Module, second: nn.Module) -> nn.Module:
    return nn.Sequential(first, nn.Tanh(), second)


class OwnsParameters(nn.Module):
    """No rule: a class token and a scale beside a child layer."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.scale = nn.Parameter(torch.randn(4))
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        token = self.token.expand(x.shape[0], 1, 4)
        return self.inner(torch.cat([token, x], 1)) * self.scale


class ScaledLinear(nn.Linear):
    """Overrides forward: Linear's rule would be wrong."""

    def forward(self, input):
        return super().forward(input) * self.weight.sum()


class Positions(nn.Module):
    """Position ids of shape (1, t) beside tokens (n, t)."""

    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(7, 4), nn.Embedding(3, 4)

    def forward(self, x):
        return self.tokens(x) + self.positions(torch.arange(x.shape[1]).unsqueeze(0))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


class Steps(nn.Module):
    """A cell called at every position, from zeros or from a state that is given."""

    def __init__(self, cell: nn.RNNCellBase, given: bool):
        super().__init__()
        self.cell, self.given, self.start = cell, given, nn.Linear(4, 3)

    def forward(self, x):
        h = self.start(x[:, 0]) if self.given else None
        hx = (h, h.sin()) if self.given and isinstance(self.cell, nn.LSTMCell) else h
        states = []
        for t in range(x.shape[1]):
            hx = self.cell(x[:, t], hx)
            states += tree_leaves(hx)
        return torch.cat(states, 1)


class Outputs(nn.Module):
    """A recurrent layer's h_t at all positions and last states of every example in one row."""

    def __init__(self, layer: nn.RNNBase):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        y, last = self.layer(x if self.layer.batch_first else x.transpose(0, 1))
        y = y if self.layer.batch_first else y.transpose(0, 1)
        return torch.cat([o.flatten(1) for o in (y, *(s.transpose(0, 1) for s in tree_leaves(last)))], 1)


class Recomputed(nn.Module):
    """Layers under checkpointing."""

    def __init__(self, reentrant: bool):
        super().__init__()
        self.a, self.b, self.reentrant = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.GELU()), reentrant

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.b, self.a(x), use_reentrant=self.reentrant)


class Conv1D(nn.Module):
    """That of transformers, as rules know it: by its name."""

    __module__, __qualname__ = "transformers.pytorch_utils", "Conv1D"

    def __init__(self, outputs: int, inputs: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.randn(outputs))

    def forward(self, x):
        return torch.addmm(self.bias, x.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])


LAYERS: dict[str, Row] = {
    "linear": Row(lambda: nn.Linear(4, 3), floats(4)),
    "linear without bias": Row(lambda: nn.Linear(4, 3, bias=False), floats(4)),
    "linear, few positions": Row(lambda: nn.Linear(4, 3), floats(2, 4)),
    "linear, many positions": Row(lambda: nn.Linear(4, 3), floats(40, 4)),
    "linear, two position dimensions": Row(lambda: nn.Linear(4, 3), floats(2, 3, 4)),
    "linear, positions equal to examples": Row(lambda: nn.Linear(4, 3), floats(B, 4)),
    "linear, frozen weight": Row(lambda: frozen(nn.Linear(4, 3), "weight"), floats(4)),
    "linear, frozen bias": Row(lambda: frozen(nn.Linear(4, 3), "bias"), floats(3, 4)),
    "linear, frozen in front": Row(
        lambda: after(frozen(frozen(nn.Linear(4, 3), "weight"), "bias"), nn.Linear(3, 2)), floats(4)
    ),
    "linear, twice": Row(lambda: after(nn.Linear(4, 3), nn.Linear(3, 2)), floats(3, 4)),
    "linear, in-place activation": Row(
        lambda: nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True), nn.Linear(3, 2)), floats(4)
    ),
    "linear, positions and in-place activation": Row(
        lambda: nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True), nn.Linear(3, 2)), floats(3, 4)
    ),
    "linear, forward overridden": Row(lambda: ScaledLinear(4, 3), floats(4)),
    "linear, non-contiguous": Row(lambda: nn.Linear(4, 3), lambda: torch.randn(4, 6, B).permute(2, 1, 0)),
    "embedding": Row(lambda: nn.Embedding(7, 4), ids(6)),
    "embedding, padding": Row(lambda: nn.Embedding(7, 4, padding_idx=2), ids(6)),
    "embedding, one id an example": Row(lambda: nn.Embedding(7, 4), ids()),
    "embedding, ids equal": Row(lambda: nn.Embedding(7, 4), lambda: torch.full((B, 6), 3)),
    "embedding, position ids": Row(Positions, ids(3)),
    "layer norm": Row(lambda: nn.LayerNorm(4), floats(3, 4)),
    "layer norm, two dimensions": Row(lambda: after(nn.Linear(4, 4), nn.LayerNorm((3, 4))), floats(3, 4)),
    "layer norm without bias": Row(lambda: after(nn.Linear(4, 4), nn.LayerNorm(4, bias=False)), floats(4)),
    "rms norm": Row(lambda: after(nn.Linear(4, 4), nn.RMSNorm(4)), floats(3, 4)),
    "rms norm, eps": Row(lambda: after(nn.Linear(4, 4), nn.RMSNorm((3, 4), eps=0.1)), floats(3, 4)),
    "group norm": Row(lambda: after(nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4)), floats(4, 3, 3)),
    "group norm, no positions": Row(lambda: after(nn.Linear(4, 8), nn.GroupNorm(2, 8)), floats(4)),
    "instance norm 1d": Row(lambda: after(nn.Conv1d(3, 4, 1), nn.InstanceNorm1d(4, affine=True)), floats(3, 5)),
    "instance norm 2d": Row(lambda: after(nn.Conv2d(3, 4, 1), nn.InstanceNorm2d(4, affine=True)), floats(3, 3, 3)),
    "instance norm 3d": Row(lambda: nn.InstanceNorm3d(3, affine=True), floats(3, 2, 2, 3)),
    "batch norm, evaluation": Row(lambda: after(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval(), floats(3, 3, 3)),
    "conv1d": Row(lambda: nn.Conv1d(3, 4, 3), floats(3, 7)),
    "conv1d, dilated and strided": Row(lambda: nn.Conv1d(3, 4, 3, stride=2, dilation=2, padding=1), floats(3, 9)),
    "conv2d": Row(lambda: after(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 3)), floats(3, 5, 5)),
    "conv2d, groups": Row(lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False), floats(4, 5, 5)),
    "conv2d, depthwise": Row(lambda: nn.Conv2d(4, 8, 3, groups=4, padding="same"), floats(4, 5, 5)),
    "conv2d, even kernel, same": Row(
        lambda: after(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 4, (2, 4), padding="same")), floats(3, 5, 5)
    ),
    "conv2d, dilated same": Row(lambda: nn.Conv2d(3, 4, 3, padding="same", dilation=2), floats(3, 6, 6)),
    "conv2d, non-square": Row(
        lambda: nn.Conv2d(3, 4, (3, 1), stride=(1, 2), padding=(2, 0), dilation=(2, 1)), floats(3, 6, 5)
    ),
    "conv2d, channels last": Row(
        lambda: nn.Conv2d(3, 4, 3), lambda: torch.randn(B, 3, 5, 5).contiguous(memory_format=torch.channels_last)
    ),
    **{
        f"conv2d, {mode}": Row(
            lambda mode=mode: after(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 4, 3, padding=(1, 2), padding_mode=mode)),
            floats(3, 5, 5),
        )
        for mode in ("reflect", "replicate", "circular")
    },
    "conv3d": Row(lambda: nn.Conv3d(2, 4, 2, groups=2, stride=(1, 2, 1), padding=1), floats(2, 3, 4, 3)),
    "transposed conv1d": Row(lambda: nn.ConvTranspose1d(3, 4, 3), floats(3, 7)),
    "transposed conv1d, groups": Row(lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2, bias=False), floats(4, 5)),
    "transposed conv2d": Row(
        lambda: after(nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, output_padding=1), nn.ConvTranspose2d(4, 2, 2)),
        floats(3, 3, 3),
    ),
    "transposed conv2d, non-square": Row(
        lambda: nn.ConvTranspose2d(
            4, 4, (3, 2), stride=(2, 3), padding=(0, 1), output_padding=(1, 0), groups=4, dilation=(1, 2)
        ),
        floats(4, 3, 4),
    ),
    "transposed conv2d, output size": Row(
        lambda: nn.ConvTranspose2d(3, 4, 3, stride=2), lambda: {"input": floats(3, 4, 4)(), "output_size": (10, 9)}
    ),
    "transposed conv2d, channels last": Row(
        lambda: nn.ConvTranspose2d(3, 4, 3), lambda: floats(3, 4, 4)().contiguous(memory_format=torch.channels_last)
    ),
    "transposed conv3d": Row(
        lambda: nn.ConvTranspose3d(2, 4, 2, groups=2, stride=(1, 2, 1), padding=1, output_padding=(0, 1, 0)),
        floats(2, 3, 2, 3),
    ),
    **{
        f"embedding bag, {mode}": Row(lambda mode=mode: nn.EmbeddingBag(7, 4, mode=mode), ids(6))
        for mode in ("sum", "mean", "max")
    },
    **{
        f"embedding bag, {mode}, padding": Row(
            lambda mode=mode: nn.EmbeddingBag(4, 4, mode=mode, padding_idx=2), ids(6, top=4)
        )
        for mode in ("sum", "mean", "max")
    },
    "embedding bag, one id a bag": Row(lambda: nn.EmbeddingBag(7, 4), ids(1)),
    "embedding bag, ids equal": Row(lambda: nn.EmbeddingBag(7, 4, mode="max"), lambda: torch.full((B, 6), 3)),
    "embedding bag, padding only": Row(
        lambda: nn.EmbeddingBag(7, 4, mode="max", padding_idx=0), lambda: ids(6)() * (torch.arange(B) % 2).unsqueeze(1)
    ),
    "embedding bag, weighted": Row(
        lambda: nn.EmbeddingBag(4, 4, mode="sum", padding_idx=0),
        lambda: {"input": ids(6, top=4)(), "per_sample_weights": torch.randn(B, 6)},
    ),
    "bilinear": Row(lambda: nn.Bilinear(3, 4, 2), lambda: (floats(3)(), floats(4)())),
    "bilinear, positions": Row(lambda: nn.Bilinear(3, 4, 2), lambda: (floats(6, 3)(), floats(6, 4)())),
    "bilinear without bias": Row(
        lambda: nn.Bilinear(3, 4, 2, bias=False), lambda: (floats(2, 3, 3)(), floats(2, 3, 4)())
    ),
    "bilinear, frozen weight": Row(lambda: frozen(nn.Bilinear(3, 4, 2), "weight"), lambda: (floats(3)(), floats(4)())),
    "prelu": Row(lambda: after(nn.Linear(4, 3), nn.PReLU()), floats(4)),
    "prelu, positions": Row(lambda: nn.PReLU(init=-0.5), floats(3, 4, 4)),
    "prelu, channels": Row(lambda: nn.PReLU(3), floats(3, 4, 4)),
    "prelu, channels without positions": Row(lambda: nn.PReLU(3), floats(3)),
    "transformers Conv1D": Row(lambda: Conv1D(3, 4), floats(4)),
    "transformers Conv1D, positions": Row(lambda: after(Conv1D(3, 4), Conv1D(2, 3)), floats(6, 4)),
    "without a rule": Row(OwnsParameters, floats(3, 4)),
    "multi-head attention": Row(Attention, floats(3, 4)),
    "transformer layer": Row(
        lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True, activation=F.gelu), floats(3, 4)
    ),
    "checkpointed": Row(lambda: Recomputed(reentrant=False), floats(4)),
    "checkpointed, reentrant": Row(lambda: Recomputed(reentrant=True), floats(4)),
}

# Recurrent layers

CELLS: dict[str, Callable[[], nn.RNNCellBase]] = {
    "rnn cell": lambda: nn.RNNCell(4, 3),
    "rnn cell, relu without bias": lambda: nn.RNNCell(4, 3, bias=False, nonlinearity="relu"),
    "lstm cell": lambda: nn.LSTMCell(4, 3),
    "gru cell": lambda: nn.GRUCell(4, 3),
    "gru cell without bias": lambda: nn.GRUCell(4, 3, bias=False),
}


def steps(make: Callable[[], nn.RNNCellBase]) -> Row:
    return Row(lambda: Steps(make(), given=True), floats(3, 4))


# torch.func has no batching rule for these.
RECURRENT: dict[str, Row] = {
    "lstm cell": steps(CELLS["lstm cell"]),
    "rnn": Row(lambda: Outputs(nn.RNN(4, 3)), floats(6, 4)),
    "rnn, relu without bias": Row(lambda: Outputs(nn.RNN(4, 3, nonlinearity="relu", bias=False)), floats(6, 4)),
    "lstm": Row(lambda: Outputs(nn.LSTM(4, 3, batch_first=True)), floats(6, 4)),
    "lstm, projected": Row(lambda: Outputs(nn.LSTM(4, 3, proj_size=2, bidirectional=True)), floats(6, 4)),
    "lstm, one position": Row(lambda: Outputs(nn.LSTM(4, 3)), floats(1, 4)),
    "gru": Row(lambda: Outputs(nn.GRU(4, 3)), floats(6, 4)),
    "gru, layers and directions": Row(
        lambda: Outputs(nn.GRU(4, 3, num_layers=2, bidirectional=True, batch_first=True)), floats(6, 4)
    ),
    "gru, positions equal to examples": Row(lambda: Outputs(nn.GRU(4, 3)), floats(B, 4)),
}

LAYERS |= {name: steps(make) for name, make in CELLS.items() if name not in RECURRENT}
