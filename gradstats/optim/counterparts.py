"""torch's optimizers beside ours: the options and the state of the one as those of the other.

Ours are torch's at the batch size at which they were tuned, but for how they keep their state: averages without the
zero that torch's start from, a momentum_buffer that has slowed down until the next step already, ages in examples.

At another batch size B, torch has our values at k = B/batch_size

    lr k    beta^k    momentum^k and lr k (1 - momentum^k)/(1 - momentum)    lr' wd' = 1 - (1 - lr wd)^k if decoupled

and mu^2 + sigma^2/B in place of our second moment mu^2 + sigma^2/R. Where noise dominates, the one is R/B times the
other, and lr sqrt(R/B), eps sqrt(R/B) make up for it: for R = batch_size the square-root rule, lr sqrt(k), eps/sqrt(k)
(Malladi et al. 2022, arXiv:2205.10287).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradstats.errors import GradstatsError
from gradstats.optim.adam import BatchInvariantAdam
from gradstats.optim.base import ExampleOptimizer
from gradstats.optim.moment import reference_of
from gradstats.optim.parts import COVERED
from gradstats.optim.rmsprop import BatchInvariantRMSprop
from gradstats.optim.sgd import BatchInvariantSGD, heavy_ball
from gradstats.units import forgotten

# So many steps that torch's Adam divides by 1 from here on; float32, in which it counts them, can add no more.
UNBIASED = 2.0**24

Group = dict[str, Any]
State = dict[str, Any]


class Pair(ABC):
    """An optimizer of torch's and ours."""

    theirs: ClassVar[tuple[type[Optimizer], ...]]
    ours: ClassVar[type[ExampleOptimizer]]
    shared: ClassVar[tuple[str, ...]]  # options of both
    missing: ClassVar[dict[str, Callable[[Any], bool]]] = {  # what torch's has not
        "max_norm": lambda bound: bound is not None,
        "average": lambda kind: kind == "mean",
    }

    def our_options(self, group: Group, batch_size: int) -> dict[str, Any]:
        for name in ("differentiable", "capturable"):
            if group.get(name):
                raise GradstatsError(f"{name}=True has no batch-size-invariant counterpart: make the optimizer without")
        decoupled = group.get("decoupled_weight_decay", False)
        return {name: group[name] for name in self.shared} | {
            "decoupled_weight_decay": decoupled,
            "batch_size": batch_size,
        }

    def their_options(self, group: Group, batch_size: float) -> dict[str, Any]:
        for name, missing in self.missing.items():
            if missing(group[name]):
                raise GradstatsError(
                    f"{name} = {group[name]!r} has no counterpart in torch: set another in param_groups"
                )
        return {name: group[name] for name in self.shared}

    def their_kind(self, groups: list[dict[str, Any]]) -> Any:
        return self.theirs[0]

    @abstractmethod
    def our_state(self, state: State, group: Group) -> State: ...

    @abstractmethod
    def their_state(self, state: State, group: Group, batch_size: int) -> State: ...


class AdamPair(Pair):
    theirs = (torch.optim.Adam, torch.optim.AdamW)
    ours = BatchInvariantAdam
    shared = ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize")

    def their_kind(self, groups: list[dict[str, Any]]) -> Any:
        return torch.optim.AdamW if all(group["decoupled_weight_decay"] for group in groups) else torch.optim.Adam

    def their_options(self, group: Group, batch_size: float) -> dict[str, Any]:
        k, noise = batch_size / group["batch_size"], math.sqrt(noise_ratio(group, batch_size))
        lr = k * noise * group["lr"] * (group["eps"] if group["denominator"] == "slides" else 1)
        options = super().their_options(group, batch_size) | {
            "lr": lr,
            "betas": tuple(kept(group["average"], beta, k) for beta in group["betas"]),
            "eps": noise * group["eps"],
            "decoupled_weight_decay": group["decoupled_weight_decay"],
        }
        if group["decoupled_weight_decay"]:
            options["weight_decay"] = decoupled_decay(group, lr, k)
        return options

    def our_state(self, state: State, group: Group) -> State:
        if not state:
            return {}
        steps, batch_size = int(state["step"]), group["batch_size"]
        first, second = (forgotten(beta, steps) if steps else 1.0 for beta in group["betas"])
        largest = {"max_exp_avg_sq": state["max_exp_avg_sq"]} if group["amsgrad"] else {}
        return largest | {
            "step": torch.tensor(round(steps * batch_size)),
            "exp_avg": state["exp_avg"] / first,
            "exp_avg_sq": state["exp_avg_sq"] / second,
        }

    def their_state(self, state: State, group: Group, batch_size: int) -> State:
        ratio, steps = noise_ratio(group, batch_size), int(state["step"]) / batch_size
        if group["average"] == "ewma":
            steps = UNBIASED
        first, second = (forgotten(beta, steps) for beta in self.their_options(group, batch_size)["betas"])
        largest = {"max_exp_avg_sq": ratio * state["max_exp_avg_sq"]} if group["amsgrad"] else {}
        return largest | {
            "step": torch.tensor(steps),
            "exp_avg": first * state["exp_avg"],
            "exp_avg_sq": ratio * second * floored(state, group),
        }


class SGDPair(Pair):
    theirs = (torch.optim.SGD,)
    ours = BatchInvariantSGD
    shared = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")

    def their_options(self, group: Group, batch_size: float) -> dict[str, Any]:
        k, before = batch_size / group["batch_size"], group["momentum"]
        momentum = kept(group["average"], before, k)
        lr = k * (1 - momentum) / (1 - before) * group["lr"]
        options = super().their_options(group, batch_size) | {"lr": lr, "momentum": momentum}
        if group["average"] != "heavy_ball" and before != 0:
            options |= {"lr": (1 - group["dampening"]) * lr, "dampening": 0.0}
        if group["decoupled_weight_decay"] and group["weight_decay"] != 0:
            if before != 0:
                raise no_decoupled_decay("SGD with momentum")
            options["weight_decay"] = decoupled_decay(group, lr, k)
        return options

    def our_state(self, state: State, group: Group) -> State:
        if state.get("momentum_buffer") is None:
            return {}
        # torch does not count: all that matters is that the first batch, which has no dampening, is past.
        step, coasting = round(group["batch_size"]), heavy_ball(group["momentum"], 1)["coasting"]
        return {"step": torch.tensor(step), "momentum_buffer": coasting * state["momentum_buffer"]}

    def their_state(self, state: State, group: Group, batch_size: int) -> State:
        if group["momentum"] == 0:
            return {}
        if group["average"] != "heavy_ball":
            momentum = self.their_options(group, batch_size)["momentum"]
            return {"momentum_buffer": state["exp_avg"] / (1 - momentum)}
        return {"momentum_buffer": velocity(state, group, batch_size)}


class RMSpropPair(Pair):
    theirs = (torch.optim.RMSprop,)
    ours = BatchInvariantRMSprop
    shared = ("lr", "alpha", "eps", "weight_decay", "momentum", "centered", "maximize")
    missing = Pair.missing | {"exponent": lambda exponent: exponent != 0.5, "eps_inside": bool}

    def their_options(self, group: Group, batch_size: float) -> dict[str, Any]:
        if group["decoupled_weight_decay"] and group["weight_decay"] != 0:
            raise no_decoupled_decay("RMSprop")
        k, noise = batch_size / group["batch_size"], math.sqrt(noise_ratio(group, batch_size))
        momentum = group["momentum"] ** k
        return super().their_options(group, batch_size) | {
            "lr": k * noise * (1 - momentum) / (1 - group["momentum"]) * group["lr"],
            "alpha": kept(group["average"], group["alpha"], k),
            "eps": noise * group["eps"],
            "momentum": momentum,
        }

    def our_state(self, state: State, group: Group) -> State:
        if not state:
            return {}
        examples = torch.tensor(round(int(state["step"]) * group["batch_size"]))
        found = {"step": examples, "exp_avg_sq": state["square_avg"]}
        if group["centered"]:
            found |= {"exp_avg": state["grad_avg"], "exp_avg_step": examples.clone()}
        if group["momentum"] != 0:
            found["momentum_buffer"] = heavy_ball(group["momentum"], 1)["coasting"] * state["momentum_buffer"]
        return found

    def their_state(self, state: State, group: Group, batch_size: int) -> State:
        ratio, s = noise_ratio(group, batch_size), floored(state, group)
        found = {"step": torch.tensor(int(state["step"]) / batch_size), "square_avg": ratio * s}
        if group["centered"]:  # the mean has no noise
            mu2 = state["exp_avg"].square()
            found |= {"grad_avg": state["exp_avg"], "square_avg": mu2 + ratio * (s - mu2).clamp(min=0)}
        if group["momentum"] != 0:
            found["momentum_buffer"] = velocity(state, group, batch_size) / math.sqrt(ratio)
        return found


PAIRS: tuple[Pair, ...] = (AdamPair(), SGDPair(), RMSpropPair())


def in_torchs_units(optimizer: ExampleOptimizer, group: Group, batch_size: float) -> tuple[str, dict[str, Any]]:
    """torch's optimizer, and its options for a group at a batch size. Raises: GradstatsError."""
    pair = pair_of(optimizer)
    options = pair.their_options(group | {"max_norm": None}, batch_size)
    return pair.their_kind([options]).__name__, options


def pair_of(optimizer: ExampleOptimizer) -> Pair:
    pair = next((pair for pair in PAIRS if type(optimizer) is pair.ours), None)
    if pair is None:
        known = ", ".join(pair.ours.__name__ for pair in PAIRS)
        raise GradstatsError(f"no counterpart of {type(optimizer).__name__} in torch; there is of {known}")
    return pair


def kept(average: str, beta: float, k: float) -> float:
    """What a batch leaves of an average, in the long run."""
    if average == "mean":
        return 1.0
    return max(0.0, 1 - k * (1 - beta)) if average == "slides" else beta**k


def noise_ratio(group: Group, batch_size: float) -> float:
    """R/B, by which noise makes torch's second moment larger than ours. Raises: GradstatsError for R = inf."""
    if group["source"] == "squared_batch_mean":
        return 1.0
    r = reference_of(group)
    if math.isinf(r):
        raise GradstatsError("the square of the mean alone, R = inf, has no counterpart in torch: set a finite R")
    return r / batch_size


def floored(state: State, group: Group) -> Tensor:
    """s, as it is used."""
    s = state["exp_avg_sq"]
    s = torch.maximum(s, state["exp_avg_q"] / reference_of(group)) if "exp_avg_q" in state else s.clamp(min=0)
    return torch.maximum(s, state["exp_avg"].square()) if COVERED in state and "exp_avg" in state else s


def velocity(state: State, group: Group, batch_size: int) -> Tensor:
    """torch's momentum_buffer, which has not coasted until the next batch yet."""
    k = batch_size / group["batch_size"]
    return state["momentum_buffer"] / (k * heavy_ball(group["momentum"], k)["coasting"])


def decoupled_decay(group: Group, lr: Any, k: float) -> float:
    """weight_decay with which a step at lr decays as k tuned steps do."""
    before, wd = float(group["lr"]), group["weight_decay"]
    if k == 1 and lr == before:
        return wd
    return (1 - (1 - before * wd) ** k) / float(lr) if before != 0 else wd


def no_decoupled_decay(name: str) -> GradstatsError:
    return GradstatsError(f"torch's {name} has no decoupled weight decay: decoupled_weight_decay=False")
