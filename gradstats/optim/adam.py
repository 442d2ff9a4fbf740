"""Batch-size-invariant Adam: time in examples, second moment from per-example gradients."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradstats.contribution import accumulation_dtype
from gradstats.errors import GradstatsError, MissingStatistic
from gradstats.handle import handle_of
from gradstats.statistics import Window, reference_weight
from gradstats.units import average


@dataclass(frozen=True)
class StepScalars:
    """The scalars of one step, common to all parameters with the same batch size, age and options.

    m~ <- (1 - w1) m~ + w1 m
    s  <- (1 - w2) s + w2 v_R
    q~ <- (1 - w3) q~ + w3 q          only where v_R is estimated across steps
    """

    w1: float
    w2: float
    w3: float | None
    batch_size: int
    reference: float
    first: bool  # no average before this batch
    mean_scale: float  # m = mean_scale p.grad
    square_scale: float  # q = square_scale sum_b c_b^2

    @property
    def across_steps(self) -> bool:
        return self.reference > self.batch_size


class BatchInvariantAdam(Optimizer):
    """Adam, tuned once at one batch size and used at any.

    With m the mean gradient and v_R = m^2 + (1/R - 1/B) s2 the second moment at the reference batch size R, both of a
    batch of B examples, and w = (1 - rho^B)/(1 - rho^E), rho = beta^(1/batch_size), E the examples that the parameter
    has seen:

        m~ <- (1 - w1) m~ + w1 m
        s  <- (1 - w2) s  + w2 v_R
        p  <- p (1 - lr weight_decay)^(B/batch_size) - (B/batch_size) lr m~ / (sqrt(s) + eps)

    At B = R = batch_size this is torch.optim.AdamW's trajectory (Adam's for weight_decay = 0); at any other B the
    learning curve against examples stays, until the step itself grows too long for the loss surface.

    R > B cannot be had from one batch (nor can R > 1 from one example). There mu^2 is estimated across steps, by the
    product of this gradient with the running average before it, v = q/R + (1 - 1/R) m m~, and s is floored at q~/R,
    which is valid since mu^2 + sigma^2/R >= (mu^2 + sigma^2)/R. This keeps one more buffer, q~; all other settings keep
    Adam's two.

    Arguments:
        lr, betas, eps, weight_decay: torch.optim.AdamW's, as tuned at `batch_size`. The default weight_decay is 0.
        batch_size: the batch size at which those values were tuned.
        reference_batch_size: R >= 1; None means `batch_size`. R = 1 is the mean of squared per-example gradients.
        average: "exponential" as above, or "slides", w = B / min(E, N) with N = batch_size / (1 - beta).
        max_norm: bounds the norm of m~ over all parameters of the optimizer, unlike clipping of the batch gradient,
            which depends on the batch size. None does not clip.
        maximize: ascend instead of descend.

    Gradients are the batch's; statistics come from `gradstats.attach(model)`, found through the parameters. The state's
    "step" counts examples, as an integer.

    Raises: MissingStatistic by `step` for a gradient without statistics; LifetimeError if R > 1 and the gradient was
        changed after the backward pass (clip with max_norm). A step with lr = 0 before any backward only allocates
        state, as distributed checkpointing wants.

    Source: D. McAllester, TTIC 31230 lecture slides, "SGD, Momentum, RMSProp, Adam"; Kingma & Ba 2015, Algorithm 1;
    decoupled weight decay: Loshchilov & Hutter 2019, Algorithm 2.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        batch_size: float = 256,
        reference_batch_size: float | None = None,
        average: str = "exponential",
        max_norm: float | None = None,
        maximize: bool = False,
    ):
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "batch_size": batch_size,
            "reference_batch_size": reference_batch_size,
            "average": average,
            "max_norm": max_norm,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

        self._step_supports_amp_scaling = True

    @classmethod
    def in_examples(
        cls,
        params: Any,
        lr: float | Tensor = 4e-6,
        horizons: tuple[float, float] = (2560, 256_000),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        reference_batch_size: float = 1,
        average: str = "exponential",
        max_norm: float | None = None,
        maximize: bool = False,
    ) -> BatchInvariantAdam:
        """The slides' parametrisation: lr an example, and horizons N in examples, rho = 1 - 1/N.

        The same as values tuned at batch size 1 with betas = 1 - 1/N.
        """
        if not all(n >= 1 for n in horizons):
            raise GradstatsError(f"horizons are numbers of examples, at least 1; got {horizons}")
        betas = (1 - 1 / horizons[0], 1 - 1 / horizons[1])
        return cls(params, lr, betas, eps, weight_decay, 1, reference_batch_size, average, max_norm, maximize)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        check = {
            "lr": float(group["lr"]) >= 0,
            "betas": all(0 <= beta < 1 for beta in group["betas"]),
            "eps": group["eps"] >= 0,
            "weight_decay": group["weight_decay"] >= 0,
            "batch_size": group["batch_size"] > 0,
            "reference_batch_size": group["reference_batch_size"] is None or group["reference_batch_size"] >= 1,
            "max_norm": group["max_norm"] is None or group["max_norm"] > 0,
        }
        for name, valid in check.items():
            if not valid:
                self.param_groups.pop()
                raise GradstatsError(f"invalid {name} = {group[name]!r}")
        for beta in group["betas"]:
            average(group["average"], beta, group["batch_size"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step on the gradients and statistics of the last backward pass(es)."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        loss_scale = self._loss_scale()
        if loss_scale is None:
            return loss
        buckets = self._gather(loss_scale)
        for (_, weights), parameters in buckets.items():
            update_averages(
                [p for p, _ in parameters], [w for _, w in parameters], [self.state[p] for p, _ in parameters], weights
            )
        clip = self._clip_factor([p for parameters in buckets.values() for p, _ in parameters])
        for (index, weights), parameters in buckets.items():
            ps = [p for p, _ in parameters]
            update_parameters(ps, [self.state[p] for p in ps], weights, self.param_groups[index], clip)
        return loss

    def _gather(self, loss_scale: float) -> dict[tuple[int, StepScalars], list[tuple[Tensor, Window]]]:
        """Parameters that have gradients, with their statistics, grouped by what their step has in common."""
        buckets = defaultdict(list)
        seen: dict[tuple[Any, ...], StepScalars] = {}  # parameters of one age share them
        for index, group in enumerate(self.param_groups):
            reference = group["reference_batch_size"] or group["batch_size"]
            lr = float(group["lr"])
            if lr * group["weight_decay"] > 1:
                raise GradstatsError(
                    f"lr = {lr} times weight_decay = {group['weight_decay']} is above 1: no decay factor"
                )
            averages = [average(group["average"], beta, group["batch_size"]) for beta in group["betas"]]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    allocate(state, p)
                window = self._window(p, reference, lr)
                if window is None:
                    continue
                b = window.batch_size
                if reference > b and "exp_avg_q" not in state:
                    state["exp_avg_q"] = torch.zeros_like(state["exp_avg"])
                    state["exp_avg_q_step"] = torch.tensor(0)
                e = int(state["step"]) + b
                e_q = int(state["exp_avg_q_step"]) + b if "exp_avg_q" in state else None
                key = (index, b, e, e_q, window.scale)
                if key not in seen:
                    w1, w2 = (a.weight(b, e) for a in averages)
                    w3 = None if e_q is None else averages[1].weight(b, e_q)
                    scales = window.scale / b / loss_scale, window.scale**2 / b / loss_scale**2
                    seen[key] = StepScalars(w1, w2, w3, b, reference, e == b, *scales)
                buckets[index, seen[key]].append((p, window))
        return buckets

    def _loss_scale(self) -> float | None:
        """What GradScaler multiplied the loss by, 1 without it; None for a step to skip, since gradients overflowed.

        GradScaler leaves the unscaling to optimizers with `_step_supports_amp_scaling`, as here: squares need it twice.
        """
        found_inf, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        if found_inf is None:
            return 1.0
        if scale is None:
            raise GradstatsError(
                "scaler.unscale_(optimizer) unscales the gradients but not their squares: leave it to "
                "scaler.step(optimizer), and clip with max_norm"
            )
        return None if float(found_inf) > 0 else float(scale)

    def _window(self, p: Any, reference: float, lr: float) -> Window | None:
        handle = handle_of(p)
        try:
            if handle is None:
                raise MissingStatistic(
                    f"no statistics for a parameter of shape {tuple(p.shape)}: call gradstats.attach(model) before the "
                    f"forward pass, and give parameters that are named in ignore to another optimizer"
                )
            # With R = 1 the mean gradient enters linearly only, and whoever changed it meant to.
            return handle.window(p, ("sum_of_squares",), needs_gradient=reference != 1)
        except MissingStatistic:
            # Distributed checkpointing's empty step, or a layer that was not used, its gradient zeroed in place.
            if lr == 0 or (handle is not None and not bool(p.grad.any())):
                return None
            raise

    def _clip_factor(self, parameters: list[Tensor]) -> dict[float, Tensor]:
        """min(1, max_norm / ||m~||) for every max_norm in use; ||m~|| over all parameters of this step."""
        bounds = {group["max_norm"] for group in self.param_groups if group["max_norm"] is not None}
        if not bounds or not parameters:
            return {}
        norms = torch._foreach_norm([self.state[p]["exp_avg"] for p in parameters])
        norm = torch.stack([n.to(norms[0].device, norms[0].dtype) for n in norms]).norm()
        return {bound: (bound / norm).clamp(max=1.0) for bound in bounds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but the averages keep their own dtype: torch would cast float32 moments to a bfloat16
        parameter's."""
        super().load_state_dict(state_dict)
        saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(saved_ids, parameters, strict=True):
            for key, value in state_dict["state"].get(i, {}).items():
                device = "cpu" if key.endswith("step") else p.device
                self.state[p][key] = value.detach().clone().to(device)


def allocate(state: dict[str, Any], p: Tensor) -> None:
    state["step"] = torch.tensor(0)  # examples seen: on the CPU, since it decides scalars of the step
    state["exp_avg"] = torch.zeros_like(p, dtype=accumulation_dtype(p.dtype), memory_format=torch.preserve_format)
    state["exp_avg_sq"] = torch.zeros_like(state["exp_avg"])


def update_averages(
    parameters: list[Tensor], windows: list[Window], states: list[dict[str, Any]], w: StepScalars
) -> None:
    """Moves m~, s and q~ (see StepScalars), all parameters at once.

    v_R = (1 - k) m^2 + k q with k = (B/R - 1)/(B - 1) within the batch; v_R = (1 - 1/R) m m~ + q/R across steps.
    """
    b, r = w.batch_size, w.reference
    torch._foreach_add_([s["step"] for s in states], b)
    averages, squares = [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]
    gradients = [p.grad for p in parameters if p.grad is not None]
    m = torch._foreach_mul([g.to(a.dtype) for g, a in zip(gradients, averages, strict=True)], w.mean_scale)
    raw = [window.sums["sum_of_squares"] for window in windows]
    k = 1 / r if w.across_steps or b == 1 else reference_weight(b, r)
    # The first batch has no average before it: its own mean stands in, too large by sigma^2/B, and soon forgotten.
    partner = averages if w.across_steps and not w.first else m
    torch._foreach_mul_(squares, 1 - w.w2)
    if k != 1:
        torch._foreach_addcmul_(squares, m, partner, value=w.w2 * (1 - k))
    if k != 0:
        torch._foreach_add_(squares, raw, alpha=w.w2 * k * w.square_scale)
    if w.w3 is not None:
        floors = [s["exp_avg_q"] for s in states]
        torch._foreach_add_([s["exp_avg_q_step"] for s in states], b)
        torch._foreach_mul_(floors, 1 - w.w3)
        torch._foreach_add_(floors, raw, alpha=w.w3 * w.square_scale)
    torch._foreach_lerp_(averages, m, w.w1)


def update_parameters(
    parameters: list[Tensor],
    states: list[dict[str, Any]],
    w: StepScalars,
    group: dict[str, Any],
    clip: dict[float, Tensor],
) -> None:
    """p <- p (1 - lr weight_decay)^(B/batch_size) - (B/batch_size) lr m~ / (sqrt(s) + eps)."""
    lr, times = float(group["lr"]), w.batch_size / group["batch_size"]
    averages, squares = [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]
    if w.w3 is not None:  # s may still hold negative estimates of earlier steps
        floors = torch._foreach_div([s["exp_avg_q"] for s in states], w.reference)
        squares = list(torch._foreach_maximum(squares, floors))
    denominators = torch._foreach_sqrt(squares)
    torch._foreach_add_(denominators, group["eps"])
    if group["max_norm"] is not None:
        averages = list(torch._foreach_mul(averages, clip[group["max_norm"]]))
    if group["weight_decay"] != 0:
        torch._foreach_mul_(parameters, (1 - lr * group["weight_decay"]) ** times)
    sign = 1 if group["maximize"] else -1
    if all(p.dtype == a.dtype for p, a in zip(parameters, averages, strict=True)):
        torch._foreach_addcdiv_(parameters, averages, denominators, value=sign * times * lr)
    else:
        steps = torch._foreach_div(averages, denominators)
        torch._foreach_add_(
            parameters, [s.to(p.dtype) for s, p in zip(steps, parameters, strict=True)], alpha=sign * times * lr
        )
