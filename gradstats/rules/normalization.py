"""Normalisation layers: y = w xhat + b, where xhat of an example depends on that example only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from gradstats import kernels
from gradstats.contribution import Contribution
from gradstats.forms.dense import Dense, PositionSum
from gradstats.rules.registry import Rule, refuse, refuse_coupling, rule
from gradstats.sums import accumulation_dtype, wide

aten = torch.ops.aten


class Summed(Dense):
    """c (n, *shape) from torch's own kernel; those of positions (n, positions..., *shape) only when asked for."""

    def __init__(self, c: Tensor, positions: Callable[[], Contribution]):
        super().__init__(c)
        self.positions = positions

    @classmethod
    def of(cls, tensors: Sequence[Tensor], integers: Sequence[int]) -> Contribution:
        return Dense(*tensors)  # positions are not traced

    def per_token(self) -> Contribution:
        return self.positions().per_token()


def affine(d: Tensor, xhat: Tensor, keep: int, wanted: frozenset[str]) -> dict[str, Contribution]:
    """c_b = sum_t d_bt xhat_bt for the weight and sum_t d_bt for the bias, `keep` trailing dimensions kept."""
    contributions: dict[str, Contribution] = {}
    d = wide(d)  # xhat can be wider than the output: mean and deviation are kept in float32
    if "weight" in wanted:
        contributions["weight"] = PositionSum(d * xhat, keep)
    if "bias" in wanted:
        contributions["bias"] = PositionSum(d, keep)
    return contributions


def by_kernel(
    d: Tensor, x: Tensor, weight: Tensor, eps: float, centered: bool, wanted: frozenset[str], xhat: Callable[[], Tensor]
) -> tuple[Tensor | None, dict[str, Contribution]]:
    """The backward pass of LayerNorm (`centered`) and RMSNorm on a device that has our kernel."""
    from gradstats.kernels import normalization

    def by_position(name: str) -> Contribution:
        return affine(d, xhat(), weight.dim(), wanted)[name]

    grad_input, *found = normalization.backward(d, x, weight, eps, centered, wanted)
    contributions: dict[str, Contribution] = {}
    for name, c in zip(("weight", "bias"), found, strict=True):
        if c is not None and name in wanted:
            contributions[name] = Summed(c, partial(by_position, name))
    return grad_input, contributions


def channels_last(x: Tensor) -> Tensor:
    """(n, channels, positions...) as (n, positions..., channels)."""
    return x.movedim(1, -1)


@rule(nn.LayerNorm)
class LayerNorm(Rule):
    """xhat = (x - mean) / sqrt(variance + eps) over the trailing `normalized_shape` dimensions."""

    autocast = "float32"
    leading_alike = True

    @staticmethod
    def unbatched(module, x):
        return x.dim() <= len(module.normalized_shape)

    @staticmethod
    def options(module):
        return tuple(module.normalized_shape), module.eps

    @staticmethod
    def forward(options, x, parameters):
        shape, eps = options
        y, mean, rstd = torch.native_layer_norm(x, shape, parameters["weight"], parameters["bias"], eps)
        return y, (x, parameters["weight"], mean, rstd)

    @staticmethod
    def backward(options, saved, d, wanted):
        shape, eps = options
        x, weight, mean, rstd = saved
        if kernels.available(d, x) and weight.numel() <= kernels.LONGEST_ROW:
            return by_kernel(d, x, weight, eps, True, wanted, lambda: (x - mean) * rstd)
        grad_input = None
        if "input" in wanted:
            grad_input = aten.native_layer_norm_backward(d, x, shape, mean, rstd, weight, None, [True, False, False])[0]
        return grad_input, affine(d, (x - mean) * rstd, len(shape), wanted)


@rule(nn.RMSNorm)
class RMSNorm(Rule):
    """xhat = x / sqrt(mean(x^2) + eps) over the trailing `normalized_shape` dimensions."""

    autocast = "float32"
    leading_alike = True

    @staticmethod
    def unbatched(module, x):
        return x.dim() <= len(module.normalized_shape)

    @staticmethod
    def options(module):
        return tuple(module.normalized_shape), module.eps

    @staticmethod
    def forward(options, x, parameters):
        shape, eps = options
        return F.rms_norm(x, shape, parameters["weight"], eps), (x, parameters["weight"])

    @staticmethod
    def backward(options, saved, d, wanted):
        shape, eps = options
        x, weight = saved
        if kernels.available(d, x) and weight.numel() <= kernels.LONGEST_ROW and eps is not None:
            return by_kernel(d, x, weight, eps, False, wanted, lambda: F.rms_norm(x, shape, None, eps))
        xhat, rstd = aten._fused_rms_norm(x, shape, None, eps)  # which knows torch's default eps
        grad_input = None
        if "input" in wanted:
            d_xhat, dims = wide(d) * weight, tuple(range(-len(shape), 0))
            grad_input = (d_xhat - xhat * (d_xhat * xhat).mean(dims, keepdim=True)).mul_(rstd).to(x.dtype)
        return grad_input, affine(d, xhat, len(shape), wanted)


@rule(nn.GroupNorm)
class GroupNorm(Rule):
    """xhat = (x - mean) / sqrt(variance + eps) over a group of channels and all positions of an example."""

    autocast = "float32"

    @staticmethod
    def options(module):
        return module.num_groups, module.eps

    @staticmethod
    def forward(options, x, parameters):
        groups, eps = options
        n, c, positions = x.shape[0], x.shape[1], x[0, 0].numel()
        weight = parameters["weight"]
        x = x.contiguous()
        y, mean, rstd = torch.native_group_norm(x, weight, parameters["bias"], n, c, positions, groups, eps)
        return y, (x, weight, mean, rstd)

    @staticmethod
    def backward(options, saved, d, wanted):
        groups, _ = options
        x, weight, mean, rstd = saved
        n, c, positions = x.shape[0], x.shape[1], x[0, 0].numel()
        d = d.contiguous()

        def by_position() -> dict[str, Contribution]:
            xhat = (x.reshape(n, groups, -1) - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)
            return affine(channels_last(d), channels_last(xhat.reshape(x.shape)), 1, wanted)

        asked = [name in wanted for name in ("input", "weight", "bias")]
        rounds = x.dtype != accumulation_dtype(x.dtype)  # contributions, before they are squared
        if rounds or torch.compiler.is_compiling():
            settings = mean, rstd, weight, n, c, positions, groups, [asked[0], False, False]
            grad_input, *_ = aten.native_group_norm_backward(d, x, *settings)
            if rounds:
                return grad_input, by_position()
            # As the kernel has them. It takes the number of groups as a constant of the graph, and so would n become.
            bias = d.reshape(n, groups, -1, positions).sum(3)
            weights = ((d * x).reshape(n, groups, -1, positions).sum(3) - bias * mean[..., None]) * rstd[..., None]
            found = [weights, bias]
        else:
            # One example of n c channels in n groups of groups: its parameters' gradients are the contributions.
            own = (mean.view(1, -1), rstd.view(1, -1), weight.repeat(n), 1, n * c, positions, n * groups)
            grad_input, *found = aten.native_group_norm_backward(d, x, *own, asked)
        return grad_input, {
            name: Summed(value.view(n, c), lambda name=name: by_position()[name])
            for name, value, ask in zip(("weight", "bias"), found, asked[1:], strict=True)
            if ask
        }


@rule(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
class InstanceNorm(GroupNorm):
    """GroupNorm with one channel a group, as long as it keeps no running statistics."""

    @staticmethod
    def check(module: _InstanceNorm):
        if module.track_running_stats:
            raise refuse(module, "running statistics mix examples over time", "Build it with track_running_stats=False")

    @staticmethod
    def unbatched(module: _InstanceNorm, x):
        return x.dim() == module._get_no_batch_dim()

    @staticmethod
    def options(module):
        return module.num_features, module.eps


@rule(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
class BatchNorm(Rule):
    """In evaluation mode: xhat = (x - running mean) / sqrt(running variance + eps), the same affine map for every
    example."""

    autocast = "float32"

    @staticmethod
    def check(module):
        refuse_coupling(module)

    @staticmethod
    def options(module):
        return module.running_mean, module.running_var, module.eps

    @staticmethod
    def forward(options, x, parameters):
        mean, variance, eps = options
        weight = parameters["weight"]
        y = F.batch_norm(x, mean, variance, weight, parameters["bias"], training=False, eps=eps)
        return y, (x, weight, mean, (variance + eps).rsqrt())

    @staticmethod
    def backward(options, saved, d, wanted):
        x, weight, mean, rstd = saved
        xhat = (channels_last(x) - mean) * rstd
        d = channels_last(d)
        grad_input = (d * (weight * rstd)).movedim(-1, 1) if "input" in wanted else None
        return grad_input, affine(d, xhat, 1, wanted)
