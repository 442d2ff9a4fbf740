"""RNN, LSTM and GRU: layers, directions, dropout and packed sequences around `unrolled.Direction`.

    output, h_n = RNN(x, h_0),   output, (h_n, c_n) = LSTM(x, (h_0, c_0))

As inside torch, positions come first between layers, or are packed: dropout draws the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from gradstats.rules.gates import GATES
from gradstats.rules.registry import Composite, composite, refuse
from gradstats.rules.unrolled import Direction, Unroll


class Packing:
    """Between a PackedSequence and positions (t, n, ...), padded, with the examples in their original order."""

    def __init__(self, packed: PackedSequence):
        self.packed = packed
        inside = packed.batch_sizes.unsqueeze(1) > torch.arange(int(packed.batch_sizes[0]))  # (t, n), sorted
        self.lengths = inside.sum(0)
        inside = inside.to(packed.data.device)
        original = packed.unsorted_indices
        self.inside = (inside if original is None else inside[:, original]).unsqueeze(-1)

    def like(self, data: Tensor) -> PackedSequence:
        return PackedSequence(data, *self.packed[1:])

    def pad(self, data: Tensor) -> Tensor:
        return pad_packed_sequence(self.like(data))[0]

    def pack(self, x: Tensor) -> Tensor:
        by_length = self.packed.sorted_indices
        return pack_padded_sequence(x if by_length is None else x[:, by_length], self.lengths).data


@composite(nn.RNN, nn.LSTM, nn.GRU)
class Recurrent(Composite):
    """Layers on top of each other, each in one direction or in both."""

    @staticmethod
    def check(module):
        each = product(range(module.num_layers), directions(module))
        strangers = set(module._parameters).difference(*(attributes(module, *which).values() for which in each))
        if strangers:
            raise refuse(
                module,
                f"a hook computes its parameters from '{min(strangers)}' before each forward (old weight_norm, prune)",
                "Remove the hook, or leave the layer out of the attached model",
            )

    @staticmethod
    def example_dim(module, args, kwargs):
        dim, x = 0 if module.batch_first else 1, args[0]
        if isinstance(x, Tensor) and x.dim() == 2:
            raise refuse(
                module, f"its input of shape {tuple(x.shape)} has no dimension of examples", f"Use x.unsqueeze({dim})"
            )
        return dim

    @staticmethod
    def forward(module: nn.RNNBase, apply: Callable[..., Any], input: Any, hx: Any = None):
        packing = Packing(input) if isinstance(input, PackedSequence) else None
        x = input.data if packing else input
        batch_sizes = input.batch_sizes if packing else None
        if hx is None:
            module.check_input(x, batch_sizes)
        else:
            module.check_forward_args(x, hx, batch_sizes)
        lstm = module.mode == "LSTM"
        h_0, c_0 = hx if lstm and hx is not None else (hx, None)
        if packing:
            x = packing.pad(x)
        elif module.batch_first:
            x = x.transpose(0, 1)  # (t, n, i)

        h_n: list[Tensor] = []
        c_n: list[Tensor] = []
        for layer in range(module.num_layers):
            if layer > 0:
                dropped = F.dropout(packing.pack(x) if packing else x, module.dropout, module.training)
                x = packing.pad(dropped) if packing else dropped
            outputs = []
            for reverse in directions(module):
                unroll = Unroll(GATES[module.mode], reverse, packing.inside if packing else None)
                states = (None if of is None else of[len(h_n)] for of in (h_0, c_0))
                y = apply(Direction, unroll, (x.transpose(0, 1), *states), attributes(module, layer, reverse))
                y, *c = y if lstm else (y,)
                outputs.append(y.transpose(0, 1))
                h_n.append(y[:, 0 if reverse else -1])
                c_n += c
            x = torch.cat(outputs, -1)  # (t, n, directions * hidden)

        if packing:
            x = packing.like(packing.pack(x))
        elif module.batch_first:
            x = x.transpose(0, 1)
        return x, (torch.stack(h_n), torch.stack(c_n)) if lstm else torch.stack(h_n)


def directions(module: nn.RNNBase) -> tuple[bool, ...]:
    """Whether each direction of a layer runs in reverse."""
    return (False, True) if module.bidirectional else (False,)


def attributes(module: nn.RNNBase, layer: int, reverse: bool) -> dict[str, str | None]:
    """The module's names for the parameters of a direction, None for those that its settings exclude."""
    absent = set() if module.bias else {"bias_ih", "bias_hh"}
    if not module.proj_size:
        absent.add("weight_hr")
    suffix = f"_l{layer}_reverse" if reverse else f"_l{layer}"
    return {name: None if name in absent else name + suffix for name in Direction.parameters}
