"""The B_noise of Adam along a run, from moments of every element of the gradient, with and without the Hessian.

    mu_i, sigma_i    mean and standard deviation of examples' gradients        s_i = mu_i / sigma_i

Li et al. 2024 (arXiv:2405.14578, section 2) take sign(g) of the batch gradient for Adam's step. With a normal g its
mean is e_i = erf(sqrt(B/2) s_i), and what decreases a quadratic loss of Hessian H most is the learning rate

    lr = sum_i mu_i e_i / (sum_i H_ii + sum_{i != j} e_i e_j H_ij)

Where B << pi / (2 s_i^2), e_i = sqrt(2 B / pi) s_i, and lr peaks at

    B_noise = pi/2  sum_i H_ii / sum_{i != j} s_i s_j H_ij

If elements do not interact, H_ii is in proportion to sigma_i^2, and i = j is not left out, that is
pi/2 sum_i sigma_i^2 / sum_i mu_i^2: pi/2 times the simple noise scale, for which no Hessian is needed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradstats
from experiments.contest.followed import optimizer_of
from experiments.data import Split
from experiments.laboratory.along import along, looked_at
from experiments.laboratory.problem import backward

PARTS = ("mu2", "sigma2", "trace", "apart", "gain", "curvature")
SIZES = tuple(2**i for i in range(13))  # of which gain and curvature are


def moments_along(
    followed: str,
    problem: str,
    optimizer: str,
    lr: float,
    batch_size: int,
    warmup: int,
    examples: int,
    looks: int,
    probes: int,
    seed: int,
) -> dict[str, Any]:
    """At evenly spaced counts of examples the `parts` over the training set; and, online, sums over elements of
    unbiased estimates of mu_i^2 and sigma_i^2, means of all batches since the look before."""
    found: dict[str, Any] = {"examples": [], **{part: [] for part in PARTS}, "online_mu2": [], "online_sigma2": []}
    since: list[tuple[float, float]] = []

    def each(statistics: gradstats.Handle) -> None:
        estimate = statistics.noise_scale.total
        since.append((float(estimate.gradient_squared), float(estimate.trace)))

    counts = sorted({max(1, round(examples * i / looks / batch_size)) * batch_size for i in range(1, looks + 1)})
    tuned = optimizer_of(followed, optimizer, lr)
    random = torch.Generator().manual_seed(seed)
    for count, data, model, _ in along(
        problem, tuned, batch_size, warmup, seed, counts, gathered=("noise_scale",), each=each
    ):
        found["examples"].append(count)
        for part, value in parts(looked_at(problem, seed, model), data.train, probes, random).items():
            found[part].append(value)
        for part, values in zip(("online_mu2", "online_sigma2"), zip(*since, strict=True), strict=True):
            found[part].append(sum(values) / len(values))
        since.clear()
    return found


def parts(model: nn.Module, data: Split, probes: int, random: torch.Generator) -> dict[str, Any]:
    """mu2 = sum mu_i^2        sigma2 = sum sigma_i^2        trace = sum H_ii        apart = sum_{i != j} s_i s_j H_ij

    gain and curvature: numerator and denominator of lr, at each of SIZES. The diagonal is Hutchinson's, E z * Hz over
    random signs z (Bekas et al. 2007). An element that has no gradient has s = 0.
    """
    parameters = list(model.parameters())
    mu, variance = moments(model, data)
    ratio = torch.where(variance > 0, mu / variance.sqrt(), 0.0)
    loss = F.cross_entropy(model(data.x), data.y)
    slope = flat(torch.autograd.grad(loss, parameters, create_graph=True))

    def times(v: Tensor) -> Tensor:
        """H v."""
        return flat(torch.autograd.grad(slope, parameters, v.to(slope.dtype), retain_graph=True)).double()

    diagonal = torch.zeros_like(mu)
    for _ in range(probes):
        z = torch.randint(2, mu.shape, generator=random).double() * 2 - 1
        diagonal += z * times(z) / probes

    def apart(v: Tensor) -> Tensor:
        return v @ times(v) - (v.square() * diagonal).sum()

    means = [torch.erf((B / 2) ** 0.5 * ratio) for B in SIZES]
    return {
        "mu2": float(mu.square().sum()),
        "sigma2": float(variance.sum()),
        "trace": float(diagonal.sum()),
        "apart": float(apart(ratio)),
        "gain": [float(mu @ e) for e in means],
        "curvature": [float(diagonal.sum() + apart(e)) for e in means],
    }


def moments(model: nn.Module, data: Split) -> tuple[Tensor, Tensor]:
    """Mean and variance of the examples' gradients, flat."""
    with gradstats.attach(model, "variance") as statistics:
        backward(model, data.x, data.y)
        mean = flat([p.grad for p in model.parameters() if p.grad is not None])
        variance = flat([statistics.variance[name] for name, _ in model.named_parameters()])
    return mean.double(), variance.double()


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])
