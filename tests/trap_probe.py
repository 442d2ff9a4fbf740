"""Models that try to mislead the probe about where the examples are, or whether they mix."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.layers import B, floats
from tests.trap_models import linear, wired
from tests.traps import COUPLES, Case, Trap


class Owner(nn.Module):
    """Owns a bare parameter, so that it runs under vmap, and does something besides."""

    def __init__(self, forward: Callable[[Tensor, Tensor], Tensor], start: Tensor):
        super().__init__()
        self.scale, self.does = nn.Parameter(start), forward

    def forward(self, x):
        return self.does(x, self.scale)


def owner(forward: Callable[[Tensor, Tensor], Tensor], start: float = 1.5) -> Callable[[], nn.Module]:
    return lambda: Owner(forward, torch.full((4,), start))


def between(mixes: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
    """Something that may mix examples between two layers."""
    return wired(lambda m, x: m.b(mixes(m.a(x).tanh())), a=linear, b=linear)


def centred(h: Tensor) -> Tensor:
    return h - h.mean(0)


def mixed_in_the_gradient(x: Tensor, scale: Tensor) -> Tensor:
    y = x * scale
    return y + (y.mean(0) - y.mean(0).detach())


# What the first batch does not show


def zero_branch() -> nn.Module:
    model = wired(lambda m, x: m.head(x + centred(m.branch(x))), branch=linear, head=linear)()
    nn.init.zeros_(model.branch.weight)
    nn.init.zeros_(model.branch.bias)
    return model


def full() -> tuple[Tensor, Tensor]:
    return floats(6, 4)(), torch.ones(B, 6, dtype=torch.bool)


def uneven() -> tuple[Tensor, Tensor]:
    """1, 2, ... tokens; 15 in all, a multiple of the number of examples."""
    return floats(6, 4)(), torch.arange(6) <= torch.arange(B).unsqueeze(1)


def packed(m, x, mask):
    """Padding left out: only the tokens that there are reach the layers."""
    return torch.zeros_like(x).masked_scatter(mask.unsqueeze(-1), m.b(m.a(x[mask]).tanh()))


def by_length(m, x, mask):
    order = mask.sum(1).argsort(descending=True, stable=True)
    return (m.b(m.a(x[order]).tanh()) * mask[order].unsqueeze(-1))[order.argsort()]


def either_layout(first: bool) -> Callable[[], nn.Module]:
    """One layer that sees (B, T, D) and (T, B, D)."""

    def forward(m, x):
        y, z = m.a(x), m.a(x.transpose(0, 1)).transpose(0, 1)
        return (y * z.tanh()) if first else m.a((y * z).transpose(0, 1)).transpose(0, 1)

    return wired(forward, a=linear)


def time_fastest(m, x):
    h = m.a(x.transpose(0, 1).flatten(0, 1)).tanh()
    return m.b(h).unflatten(0, (x.shape[1], x.shape[0])).transpose(0, 1)


# State


class Remembers(nn.Module):
    """Two layers, and something that one forward leaves to the next."""

    def __init__(self, forward: Callable[..., Tensor]):
        super().__init__()
        self.a, self.b, self.does = linear(), linear(), forward
        self.step, self.state, self.config = 0, None, SimpleNamespace(step=0)
        self.register_buffer("bank", torch.linspace(-1, 1, 32).reshape(8, 4))

    def forward(self, x):
        return self.does(self, x)


def remembers(forward: Callable[..., Tensor]) -> Callable[[], nn.Module]:
    return lambda: Remembers(forward)


def anneals(m, x):
    m.step += 1
    return m.b(m.a(x).tanh()) * 0.9**m.step


def counts_in_an_object(m, x):
    m.config.step += 1
    return m.b(m.a(x).tanh()) * 0.9**m.config.step


def couples_later(m, x):
    m.step += 1
    h = m.a(x).tanh()
    return m.b(centred(h) if m.step > 1 else h)


def keeps_state(m, x):
    h = m.a(x).tanh() if m.state is None else m.a(x + m.state).tanh()
    m.state = h.detach()
    return m.b(h)


def looks_up(m, x):
    """A memory bank of examples of earlier batches."""
    h = m.a(x).tanh()
    read = torch.softmax(h @ m.bank.T, -1) @ m.bank
    m.bank = torch.cat([h.detach(), m.bank])[:8]
    return m.b(h + read)


def follows_the_mean(m, x):
    """Normalised by a running mean of earlier batches."""
    h = m.a(x).tanh()
    y = m.b(h - m.bank[0])
    m.bank = 0.9 * m.bank + 0.1 * h.detach().mean(0)
    return y


def quantised(m, x):
    """Straight through to the nearest entry of a codebook, which follows what falls on it."""
    h = m.a(x).tanh()
    nearest = torch.cdist(h, m.bank).argmin(1)
    q = m.bank[nearest]
    m.bank.index_add_(0, nearest, 0.1 * (h.detach() - q))
    return m.b(h + (q - h).detach())


def looks_up_itself(m, x):
    h = m.a(x).tanh()
    m.bank = torch.cat([h.detach(), m.bank])[:8]
    return m.b(h + torch.softmax(h @ m.bank.T, -1) @ m.bank)


class KeepsItsOutput(nn.Module):
    """For logging, in a module that runs under vmap."""

    def __init__(self):
        super().__init__()
        self.scale, self.last = nn.Parameter(torch.ones(4)), None

    def forward(self, x):
        y = x * self.scale
        self.last = y.detach()
        return y


# Control flow


class Experts(nn.Module):
    """Each example to the expert that its gate chooses, at most `capacity` of them, given how many there are."""

    def __init__(self, capacity: Callable[[int], int]):
        super().__init__()
        self.gate, self.experts, self.capacity = nn.Linear(4, 2), nn.ModuleList([linear(), linear()]), capacity

    def forward(self, x):
        gate = self.gate(x).softmax(-1)
        for i, expert in enumerate(self.experts):
            chosen = (gate.argmax(-1) == i).nonzero()[: self.capacity(len(x)), 0]
            x = x.index_add(0, chosen, expert(x[chosen]) * gate[chosen, i : i + 1])
        return x


def drops_layers(m, x):
    h = m.a(x).tanh()
    return h + m.b(h) if random.random() < 0.5 else h


def exits_early(m, x):
    h = m.a(x).tanh()
    return h if bool(h.abs().mean() > 0.6) else h + m.b(h)


def sometimes_mixed(h: Tensor) -> Tensor:
    return 0.7 * h + 0.3 * h.flip(0) if random.random() < 0.5 else h


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, d):
        return -d


# Several examples, or none, in a row


def hypernetwork(of_batch: bool) -> Callable[[], nn.Module]:
    def forward(m, x):
        z = x.mean(0, keepdim=True).expand_as(x) if of_batch else x
        return torch.einsum("bi,bio->bo", x, m.a(z).unflatten(1, (4, 4)))

    return wired(forward, a=lambda: nn.Linear(4, 16))


def pairs(m, x, other):
    h = m.a(torch.cat([x, other])).tanh()
    return m.b(h[: len(x)] * h[len(x) :])


def candidates(m, x, others):
    """(B, K, D) flattened in front of the layer."""
    return torch.einsum("bd,bkd->bk", m.a(x), m.a(others.flatten(0, 1)).unflatten(0, others.shape[:2]))


class OneRow(nn.Module):
    """A layer called once for all examples, and what becomes of the result."""

    def __init__(self, spread: Callable[[Tensor, Tensor], Tensor]):
        super().__init__()
        self.prompt, self.head, self.spread = linear(), linear(), spread
        self.register_buffer("z", torch.linspace(-1, 1, 4).reshape(1, 4))

    def forward(self, x):
        return self.head(self.spread(x, self.prompt(self.z)))


def one_row(spread: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], nn.Module]:
    return lambda: OneRow(spread)


class Tokens(nn.Module):
    """A class token in front, positions from a table indexed [:T]."""

    def __init__(self):
        super().__init__()
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, 4)), nn.Embedding(9, 4)
        self.body = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)

    def forward(self, x):
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        return self.body(x + self.positions.weight[: x.shape[1]])[:, 0]


CALLED_ONCE = "'prompt' .*called once for all examples.*Call it with one row an example"

# One example's rows in the place of another's: a gather or coupling, which one example alone does not tell.
ELSEWHERE = f"{COUPLES}|'b.weight', 'b.bias'.* in an order that is not known.*Attach a module"

PROBE = Trap(
    "the probe",
    {
        # Where the examples are
        "one example first": Case(between(torch.sin), floats(3, 4), before=[lambda: torch.randn(1, 3, 4)]),
        "one position first": Case(wired(time_fastest, a=linear, b=linear), floats(3, 4), before=[floats(1, 4)]),
        "one layer, both layouts": Case(either_layout(True), floats(B, 4)),
        "one layer, both layouts, (T, B, D) last": Case(either_layout(False), floats(2 * B, 4)),
        "equal examples first": Case(
            wired(time_fastest, a=linear, b=linear), floats(3, 4), before=[lambda: torch.ones(B, 3, 4)]
        ),
        "a table (T, D), T equal to B": Case(
            wired(lambda m, x, table: m.b(x + m.a(table)), a=linear, b=linear),
            lambda: (floats(B, 4)(), torch.randn(B, 4)),
        ),
        "class weights (C,), C equal to B": Case(
            wired(lambda m, x, w: m.a(x) * w, a=lambda: nn.Linear(4, B)), lambda: (floats(4)(), torch.rand(B))
        ),
        "class token, positions [:T]": Case(Tokens, floats(B, 4), before=[floats(3, 4)]),
        "pairs in one batch": Case(wired(pairs, a=linear, b=linear), lambda: (floats(4)(), floats(4)())),
        "candidates flattened": Case(wired(candidates, a=linear), lambda: (floats(4)(), floats(3, 4)())),
        "expanded in front of the layer": Case(one_row(lambda x, e: x + e.expand(len(x), -1)), floats(4)),
        "one row over the examples": Case(one_row(lambda x, e: x + e.squeeze(0)), floats(4)),
        "one row over examples and positions": Case(one_row(lambda x, e: x + e), floats(3, 4), CALLED_ONCE),
        "one row over examples and one position": Case(one_row(lambda x, e: x + e), floats(1, 4), CALLED_ONCE),
        "one row repeated": Case(one_row(lambda x, e: x + e.repeat(len(x), 1)), floats(4), CALLED_ONCE),
        # What mixes
        "roll": Case(between(lambda h: h.roll(1, 0)), floats(4), ELSEWHERE),
        "batch mean": Case(between(centred), floats(4), COUPLES),
        "batch mean of equal examples": Case(between(centred), lambda: torch.ones(B, 4), COUPLES),
        "batch mean beside a time stamp": Case(
            wired(
                lambda m, x: m.b(torch.cat([centred(m.a(x)), torch.full_like(x[:, :1], 1.7e15)], 1)),
                a=linear,
                b=lambda: nn.Linear(5, 4),
            ),
            floats(4),
            COUPLES,
        ),
        "batch mean after a branch that begins at zero": Case(zero_branch, floats(4), COUPLES),
        "batch mean behind a gate that begins at zero": Case(
            owner(lambda x, scale: x + scale * centred(x), 0.0), floats(4), COUPLES
        ),
        "batch mean in the gradient alone": Case(owner(mixed_in_the_gradient), floats(4), COUPLES),
        "batch mean from the second step on": Case(remembers(couples_later), floats(4), COUPLES, before=[floats(4)]),
        "batch mean of large batches": Case(between(lambda h: centred(h) if len(h) >= B else h), floats(4), COUPLES),
        "a part of the batch": Case(
            between(lambda h: torch.cat([h[: len(h) // 2].roll(1, 0), h[len(h) // 2 :]])), floats(4), ELSEWHERE
        ),
        "softmax over the batch": Case(between(lambda h: h.softmax(0)), floats(4), COUPLES),
        "quantised by the largest entry of the batch": Case(
            between(lambda h: h + ((h / h.abs().amax() * 7).round() * h.abs().amax() / 7 - h).detach()),
            floats(4),
            COUPLES,
        ),
        "hypernetwork of the batch mean": Case(hypernetwork(True), floats(4), COUPLES),
        "attention over examples": Case(
            wired(
                lambda m, x: m.b(m.a(x.unsqueeze(0))).squeeze(0),
                a=lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True),
                b=linear,
            ),
            floats(4),
            COUPLES,
        ),
        "(B, T, D) where (T, B, D) is meant": Case(
            wired(lambda m, x: m.b(m.a(x)[0]), a=lambda: nn.LSTM(4, 4), b=linear), floats(B, 4), COUPLES
        ),
        "MixUp of hidden states": Case(
            between(lambda h: 0.7 * h + 0.3 * h[torch.randperm(len(h))]), floats(4), COUPLES
        ),
        "MixUp at random": Case(between(sometimes_mixed), floats(4), COUPLES, before=[floats(4)] * 6),
        "noise, divided by the size of the batch": Case(
            owner(lambda x, scale: (x + 1e-9 * torch.randn_like(x)) * scale / len(x)), floats(4), COUPLES
        ),
        "control flow on the batch": Case(
            owner(lambda x, scale: x * scale if bool(x.abs().mean() < 1) else x.sin() * scale),
            lambda: floats(4)() * torch.tensor([0.01, 0.01, 0.01, 9, 9]).unsqueeze(1),
            COUPLES,
            before=[lambda: 0.01 * floats(4)()],
        ),
        "experts with a capacity": Case(lambda: Experts(lambda n: max(1, n // 3)), floats(4), COUPLES),
        # What only looks as if it did
        "hypernetwork": Case(hypernetwork(False), floats(4)),
        "experts by index": Case(lambda: Experts(lambda n: n), floats(4), before=[floats(4)]),
        "layers dropped at random": Case(wired(drops_layers, a=linear, b=linear), floats(4), before=[floats(4)] * 4),
        "early exit": Case(
            wired(exits_early, a=linear, b=linear), lambda: 9 * floats(4)(), before=[lambda: 0.1 * floats(4)()]
        ),
        "dead rows": Case(between(lambda h: (h - 1).relu()), floats(4)),
        "straight-through": Case(between(lambda h: h + (h.sign() - h).detach()), floats(4)),
        "gradient reversal": Case(between(Reversed.apply), floats(4)),
        "detached branch": Case(wired(lambda m, x: m.b(m.a(x).detach()) + m.a(x), a=linear, b=linear), floats(4)),
        "MixUp of inputs": Case(wired(lambda m, x: m.a(x), a=linear), lambda: 0.7 * floats(4)() + 0.3 * floats(4)()),
        # State
        "a counter": Case(remembers(anneals), floats(4), before=[floats(4)]),
        "a hidden state": Case(remembers(keeps_state), floats(4), before=[floats(4)] * 9),
        "a vmap leaf keeps its output": Case(KeepsItsOutput, floats(4), before=[floats(4)]),
        "a counter in an object": Case(remembers(counts_in_an_object), floats(4)),
        "a running mean": Case(remembers(follows_the_mean), floats(4), before=[floats(4)]),
        "a codebook": Case(remembers(quantised), floats(4), before=[floats(4)]),
        "random numbers of numpy": Case(between(lambda h: h * np.random.rand()), floats(4)),
        "a memory bank": Case(remembers(looks_up), floats(4), before=[floats(4)]),
        "a memory bank with the batch in it": Case(remembers(looks_up_itself), floats(4), COUPLES),
        "dropout": Case(between(lambda h: F.dropout(h, 0.5)), floats(4)),
        "dropout of equal examples": Case(between(lambda h: F.dropout(h, 0.5)), lambda: torch.ones(B, 4)),
        # What the first batch does not show
        "tokens packed by a mask": Case(wired(packed, a=linear, b=linear), uneven),
        "tokens packed by a mask, full first": Case(wired(packed, a=linear, b=linear), uneven, before=[full]),
        "sorted by length": Case(wired(by_length, a=linear, b=linear), uneven, COUPLES),
        "sorted by length, equal first": Case(wired(by_length, a=linear, b=linear), uneven, COUPLES, before=[full]),
    },
)
