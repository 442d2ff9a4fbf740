"""Statistic x engine x model: every cell agrees with the oracle, or is refused with the reason and the way out."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gradstats import CoverageError, GradstatsError, attach
from gradstats.statistics import STATISTICS
from tests import oracle
from tests.gradstats.test_statistics import DEFINITIONS, TOTALS, binned, close, flat, projected

B = 6

# Opacus' full backward hooks warn when the input of the first layer needs no gradient.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")


class TinyGPT(nn.Module):
    """One causal block; the head is the embedding's table, and positions are (1, t). No bias in the attention: that of
    its keys has no gradient but rounding, whose signs nothing agrees on."""

    def __init__(self, vocabulary=5, positions=4, d=6):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, d), nn.Embedding(positions, d)
        self.first_norm, self.attention, self.out = nn.LayerNorm(d), nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d)
        self.second_norm, self.expand, self.contract = nn.LayerNorm(d), nn.Linear(d, 2 * d), nn.Linear(2 * d, d)
        self.head = nn.Linear(d, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids):
        h = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]).unsqueeze(0))
        q, k, v = self.attention(self.first_norm(h)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        h = h + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        h = h + self.contract(F.gelu(self.expand(self.second_norm(h))))
        return self.head(h).mean(1)


class LSTMClassifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


def mlp():
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def conv_net():
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))


def batch_norm():
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 3)).eval()


MODELS = {
    "mlp": (mlp, (5,)),
    "conv net": (conv_net, (2, 4, 4)),
    "tied gpt": (TinyGPT, None),
    "lstm": (LSTMClassifier, (3, 4)),
    "batch norm, evaluation": (batch_norm, (5,)),
}

# With the number of examples a backward pass. Micro-batches of one example are exact for all that they can tell.
SINGLE = {"engine": "microbatch", "granularity": "microbatch", "microbatch_size": 1}
ENGINES = {
    "fused": ({"engine": "fused"}, B),
    "vmap": ({"engine": "vmap"}, B),
    "opacus": ({"engine": "opacus"}, B),
    "microbatch": ({"engine": "microbatch"}, 1),
    "microbatch, by name": (SINGLE, 1),
}


def problem(name):
    make, shape = MODELS[name]
    model = make().double()
    x = torch.randint(0, 5, (B, 4)) if shape is None else torch.randn(B, *shape).double()
    return model, x, torch.randint(0, 3, (B,))


def backpropagate(model, x, y, size):
    for start in range(0, B, size):
        rows = slice(start, start + size)
        (F.cross_entropy(model(x[rows]), y[rows]) * size / B).backward()


def gathered(model, x, y, size, *statistics, **options):
    """The handle after a step, `size` examples at a time."""
    stats = attach(model, *statistics, **options)
    backpropagate(model, x, y, size)
    return stats


def agrees(stats, statistic, contributions):
    """One statistic, of every parameter and of the whole gradient."""
    found, whole = stats.read(statistic), torch.cat([flat(c * B) for c in contributions.values()], 1)
    for name, c in contributions.items():
        if statistic == "histogram":
            assert torch.equal(found[name].counts.long(), binned(c * B, B))
        elif statistic == "projection":
            close(found[name], projected(c * B, name))
        else:
            close(found[name], DEFINITIONS[statistic](c * B))
    if statistic in TOTALS:
        close(found.total, DEFINITIONS[statistic](whole))


# Refused, by engine and model, or by engine and statistic. What is not here agrees.
REFUSED = {
    ("opacus", "tied gpt"): r"'positions.weight' \(4, 6\) gradients of 1 examples.*engine='fused'",
    ("opacus", "lstm"): r"module 'lstm' \(LSTM\).*engine='fused'",
    ("opacus", "batch norm, evaluation"): r"Opacus does not cover this model: .*1:BatchNorm1d",
    **{
        ("microbatch", statistic): rf"'{statistic}' of single examples.*engine='fused', or granularity='microbatch'"
        for statistic in STATISTICS
        if statistic not in ("second_moment", "variance", "noise_scale")
    },
    **{
        (
            "microbatch, by name",
            statistic,
        ): rf"'{statistic}' needs the gradients of all.*engine='fused', or 'projection'"
        for statistic in ("gram", "cosine_similarity")
    },
}


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", MODELS)
def test_matrix(name, engine, statistic):
    options, size = ENGINES[engine]
    model, x, y = problem(name)
    contributions = oracle.contributions(model, F.cross_entropy, x, y)
    refused = REFUSED.get((engine, name)) or REFUSED.get((engine, statistic))
    if refused:
        with pytest.raises(GradstatsError, match=refused):
            agrees(gathered(model, x, y, size, statistic, **options), statistic, contributions)
    else:
        agrees(gathered(model, x, y, size, statistic, **options), statistic, contributions)


@pytest.mark.parametrize("engine", ["fused", "vmap", "opacus"])
def test_batch_norm_in_training_is_for_micro_batches(engine):
    """test_microbatch.py has the numbers."""
    model, x, y = problem("mlp")
    model = nn.Sequential(model[0], nn.BatchNorm1d(7).double(), *model[1:])
    with pytest.raises(CoverageError, match="BatchNorm1d: batch statistics.*nn.GroupNorm"):
        attach(model, engine=engine)
    stats = gathered(model, x, y, 3, "second_moment", engine="microbatch")
    assert stats.second_moment["0.weight"].isfinite().all()


def partitions(rows, size):
    """All ways to part `rows` into groups of `size`."""
    if not rows:
        yield []
        return
    for others in itertools.combinations(rows[1:], size - 1):
        group = (rows[0], *others)
        for rest in partitions([r for r in rows if r not in group], size):
            yield [group, *rest]


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", MODELS)
def test_micro_batches_agree_in_expectation(name, size):
    """Over random orders of the data: the mean over all the ways to part six examples is the expectation itself."""
    model, x, y = problem(name)
    contributions = oracle.contributions(model, F.cross_entropy, x, y)
    stats = attach(model, "second_moment", "variance", "noise_scale", engine="microbatch")
    found = []
    for partition in partitions(list(range(B)), size):
        order = torch.tensor(partition).flatten()
        model.zero_grad()
        backpropagate(model, x[order], y[order], size)
        values = {(s, n): stats.read(s)[n] for s in ("second_moment", "variance") for n in contributions}
        found.append(values | {("noise_scale", "total"): torch.stack(stats.noise_scale.total)})
    assert len(found) == {2: 15, 3: 10}[size]
    whole = torch.cat([flat(c * B) for c in contributions.values()], 1)
    for statistic, parameter in found[0]:
        g = whole if parameter == "total" else contributions[parameter] * B
        close(torch.stack([f[statistic, parameter] for f in found]).mean(0), DEFINITIONS[statistic](g))


def test_backpack():
    """Sums of squares and norms of Conv2d and Linear by a third hand."""
    pytest.importorskip("backpack", reason="pip install --no-deps backpack-for-pytorch==1.7.1 einops unfoldNd")
    from backpack import backpack, extend
    from backpack.extensions import BatchL2Grad, SumGradSquared

    model, x, y = problem("conv net")
    model = nn.Sequential(*(module for module in model if not isinstance(module, nn.GroupNorm)))
    with attach(model, "second_moment", "norms") as stats:
        backpropagate(model, x, y, B)
        found = {name: (stats.second_moment[name], stats.norms[name]) for name, _ in model.named_parameters()}
    extended, loss = extend(model), extend(nn.CrossEntropyLoss())
    with backpack(SumGradSquared(), BatchL2Grad()):
        loss(extended(x), y).backward()
    for name, p in model.named_parameters():
        close(found[name][0], p.sum_grad_squared * B)
        close(found[name][1], p.batch_l2.sqrt() * B)
