"""Models and losses of the table of traps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests import oracle
from tests.layers import after, frozen


class Wired(nn.Module):
    """Children, and a forward over them."""

    def __init__(self, forward: Callable[..., Any], children: dict[str, nn.Module]):
        super().__init__()
        self.wires = forward
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, *args, **kwargs):
        return self.wires(self, *args, **kwargs)


def wired(forward: Callable[..., Any], **children: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: Wired(forward, {name: make() for name, make in children.items()})


def linear() -> nn.Linear:
    return nn.Linear(4, 4)


def tied(forward: Callable[..., Tensor]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = Wired(forward, {"embedding": nn.Embedding(7, 4), "body": linear(), "head": nn.Linear(4, 7, bias=False)})
        model.head.weight = model.embedding.weight
        return model

    return make


def sharing(forward: Callable[..., Tensor]) -> Callable[[], nn.Module]:
    """Two layers with one weight, each with a bias of its own."""

    def make() -> nn.Module:
        model = Wired(forward, {"a": linear(), "b": linear()})
        model.b.weight = model.a.weight
        return model

    return make


def weight_norm() -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(linear()), nn.Tanh(), linear())


def flattened(fastest: bool) -> Callable[[], nn.Module]:
    def forward(m, x):
        x = x.transpose(0, 1) if fastest else x
        y = m.b(m.a(x.flatten(0, 1)).tanh()).unflatten(0, x.shape[:2])
        return y.transpose(0, 1) if fastest else y

    return wired(forward, a=linear, b=linear)


def time_first() -> Callable[[], nn.Module]:
    return wired(lambda m, x: m.b(m.a(x.transpose(0, 1)).tanh()).transpose(0, 1), a=linear, b=linear)


def uneven_tokens(output: Tensor, weights: Tensor) -> Tensor:
    """A mean over the tokens that are no padding: 1 of the first example, 2 of the second, ..."""
    n, t, _ = output.shape
    labels = torch.arange(t).expand(n, t).masked_fill(torch.arange(t) > torch.arange(n).unsqueeze(1), -100)
    return F.cross_entropy(output.transpose(1, 2), labels, ignore_index=-100)


def contrastive(output: Tensor, weights: Tensor) -> Tensor:
    """In-batch negatives, both ways: a loop over batches of one example would find no gradient at all."""
    one, other = output.chunk(2, -1)
    logits, own = one @ other.T, torch.arange(len(output))
    return F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)


def with_loss(m, x):
    output = m.b(m.a(x).tanh())
    return {"loss": uneven_tokens(output, x), "logits": output}


class LowRank(nn.Module):
    """A LoRA adapter: y = W x + U V x, W frozen."""

    def __init__(self):
        super().__init__()
        self.base = frozen(frozen(linear(), "weight"), "bias")
        self.down, self.up = nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def attention_by_hand(m, x):
    """The softmax does not see the key's bias: its gradient is exactly zero."""
    return torch.softmax(m.query(x) @ m.key(x).mT, -1) @ m.value(x)


def checkpointed(reentrant: bool) -> Callable[[], nn.Module]:
    """A layer that is used inside of the segment and after it."""

    def forward(m, x):
        def segment(h):
            return m.b(m.a(h).tanh()).sin()

        return m.b(torch.utils.checkpoint.checkpoint(segment, m.first(x), use_reentrant=reentrant))

    return wired(forward, first=linear, a=linear, b=linear)


def batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))


def put_on_top(module: nn.Module) -> nn.Module:
    """As FSDP2 does: another class on the instance, made at run time, that overrides nothing."""
    module.__class__ = type(f"FSDP{type(module).__name__}", (type(module),), {})
    return module


@dataclass
class Output:
    state: Tensor
    nothing: None = None

    def __getitem__(self, key: str) -> Tensor:  # as the oracle takes outputs
        return getattr(self, key)


def of(key: str | int) -> Callable[[Any, Tensor], Tensor]:
    return lambda output, weights: oracle.coupled_loss(output[key], weights)


def sequential() -> nn.Module:
    return after(linear(), nn.Linear(4, 3))


TWO = wired(lambda m, x: m.b(m.a(x).tanh()), a=linear, b=linear)
