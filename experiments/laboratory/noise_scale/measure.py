"""The noise scale along a run: over the training set, from examples of a batch in one pass, and from two batch sizes.

G2 = |G|^2    squared norm of the true gradient        T = tr Sigma    noise of one example
E|g_B|^2 = G2 + T / B, of a batch of B
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import gradstats
from experiments.contest.followed import optimizer_of
from experiments.data import Split
from experiments.laboratory.along import along, looked_at
from experiments.laboratory.problem import backward, loss_of
from experiments.schedule import log_spaced

WHOLE = "all parameters"
ONE_PASS, TWO_SIZES = "examples, in one pass", "two batch sizes"
METHODS = (ONE_PASS, TWO_SIZES)

Pairs = Tensor  # (groups, 2): G2 and T of each


def noise_along(
    followed: str,
    problem: str,
    optimizer: str,
    lr: float,
    batch_size: int,
    warmup: int,
    examples: int,
    looks: int,
    draws: int,
    small: int,
    big: int,
    seed: int,
) -> dict[str, Any]:
    """At log-spaced counts of examples: the training loss, and of every group of parameters G2 and T.

    exact: of the training set. By method, mean: of the draws' estimates; spread: standard deviation of one draw's
    T'/T - G2'/G2, which to first order is the relative error of its noise scale.
    """
    found: dict[str, Any] = {"examples": [], "loss": [], "exact": []}
    found |= {method: {"mean": [], "spread": []} for method in METHODS}
    counts = log_spaced(examples, batch_size, looks)
    random = torch.Generator().manual_seed(seed)
    for count, data, model, _ in along(
        problem, optimizer_of(followed, optimizer, lr), batch_size, warmup, seed, counts
    ):
        copy = looked_at(problem, seed, model)
        found["groups"] = list(groups_of(copy))
        found["examples"].append(count)
        found["loss"].append(loss_of(copy, data.train))
        exact = of_population(copy, data.train)
        found["exact"].append(exact.tolist())
        for method, values in estimates(copy, data.train, draws, small, big, random).items():
            relative = values / exact
            found[method]["mean"].append(values.mean(dim=0).tolist())
            found[method]["spread"].append((relative[..., 1] - relative[..., 0]).std(dim=0).tolist())
    return found


def groups_of(model: nn.Module) -> dict[str, list[str]]:
    """Names of the parameters: all, and those of each module that has its own."""
    groups = {WHOLE: [name for name, _ in model.named_parameters()]}
    for path, module in model.named_modules():
        if own := [f"{path}.{name}" for name, _ in module.named_parameters(recurse=False)]:
            groups[f"layer {path}: {type(module).__name__}"] = own
    return groups


def of_population(model: nn.Module, data: Split) -> Pairs:
    """G2 and T, exactly, of a batch of examples drawn with replacement from these."""
    groups, n = groups_of(model), len(data)
    with gradstats.attach(model, "noise_scale") as statistics:
        backward(model, data.x, data.y)
        unbiased = one_pass(statistics, groups)
    # What the unbiased estimates of a larger population leave out of these: M = G2 + T/n, and Q - M = T (n - 1)/n.
    return torch.stack([unbiased[:, 0] + unbiased[:, 1] / n, unbiased[:, 1] * (n - 1) / n], dim=1)


def estimates(
    model: nn.Module, data: Split, draws: int, small: int, big: int, random: torch.Generator
) -> dict[str, Tensor]:
    """By method, of the same examples, (draws, groups, 2)."""
    groups = groups_of(model)
    batches = [torch.randint(len(data), (big,), generator=random) for _ in range(draws)]
    two = torch.stack([two_sizes(model, groups, data.x[b], data.y[b], small) for b in batches])
    found = []
    with gradstats.attach(model, "noise_scale") as statistics:
        for b in batches:
            backward(model, data.x[b], data.y[b])
            found.append(one_pass(statistics, groups))
    return {ONE_PASS: torch.stack(found), TWO_SIZES: two}


def one_pass(statistics: gradstats.Handle, groups: dict[str, list[str]]) -> Pairs:
    """Unbiased, from the norms of examples' gradients of the batch (gradstats/noise_scale.py)."""
    found = {name: torch.stack(list(statistics.noise_scale[name])).double() for name in groups[WHOLE]}
    return torch.stack([torch.stack([found[name] for name in names]).sum(dim=0) for names in groups.values()])


def two_sizes(model: nn.Module, groups: dict[str, list[str]], x: Tensor, y: Tensor, small: int) -> Pairs:
    """Unbiased, from |g_b|^2, mean of the shards of b examples, and |g_B|^2 of all (McCandlish et al. 2018, A.1):

    G2 = (B |g_B|^2 - b |g_b|^2) / (B - b)        T = (|g_b|^2 - |g_B|^2) / (1/b - 1/B)
    """

    def squares(rows: slice) -> Tensor:
        backward(model, x[rows], y[rows])
        norms = {name: p.grad.double().square().sum() for name, p in model.named_parameters() if p.grad is not None}
        return torch.stack([torch.stack([norms[name] for name in names]).sum() for names in groups.values()])

    big = len(x)
    of_big = squares(slice(None))
    of_small = torch.stack([squares(slice(i, i + small)) for i in range(0, big, small)]).mean(dim=0)
    signal = (big * of_big - small * of_small) / (big - small)
    return torch.stack([signal, (of_small - of_big) / (1 / small - 1 / big)], dim=1)
