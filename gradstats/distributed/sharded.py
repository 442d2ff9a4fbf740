"""FSDP2 (torch.distributed.fsdp.fully_shard): a model whose parameters are spread over the ranks of a mesh.

Rank r backpropagates its own L_r over its B_r examples, and FSDP averages: the loss whose gradient p.grad is, is

    L = (1/W) sum_r L_r        c_b = (1/W) dL_r/dtheta_b        B = sum_r B_r

for W ranks. Sums over the examples of all ranks are sharded as their parameters are, one layer at a time as the
backward pass reaches it, so that a rank never holds those of more than one in full. They are sums of W c_b, of
which a window's `scale` takes account, and B is that of all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from gradstats.distributed.spread import DTensor, FSDPModule, Partial, Placement, Replicate, Shard
from gradstats.distributed.unequal import warn_unequal
from gradstats.errors import CoverageError, GradstatsError
from gradstats.rules.registry import refuse
from gradstats.sums import RawSum


class Shards:
    """The ranks that a model is sharded over, and how sums go to them."""

    def __init__(self, model: nn.Module, mesh: DeviceMesh, loss_reduction: str):
        self.model, self.mesh, self.loss_reduction = model, mesh, loss_reduction
        self.modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
        self.warned = False

    @property
    def divisor(self) -> float:
        """By what FSDP divides the sum of the ranks' gradients: W, or what set_gradient_divide_factor says.

        Raises: GradstatsError if it is not the same in all of the model.
        """
        groups = [module._get_fsdp_state()._fsdp_param_group for module in self.modules]
        found = {group.gradient_divide_factor or self.mesh.size() for group in groups if group is not None}
        if len(found) > 1:
            raise GradstatsError(
                f"set_gradient_divide_factor differs within the model, {sorted(found)}: its parts have the gradients "
                f"of different losses. Call it on every FSDPModule of the model with the same factor"
            )
        return float(found.pop())

    def reshard(self, but: nn.Module | None = None) -> None:
        """Gives every module its sharded parameters; except one, whose forward is under way."""
        for module in self.modules:
            if module is not but:
                module.reshard()

    # Collectives: all ranks call them in the same order

    def scattered(self, own: Tensor, p: Tensor, raw: RawSum) -> Tensor:
        """The sum over all ranks' examples, sharded as the parameter p, from that over this rank's."""
        assert isinstance(p, DTensor)
        own = own.to(raw.dtype(p.dtype))  # layers may compute in a lower precision than that of the parameter
        if raw.merge is RawSum.merge:
            whole = DTensor.from_local(own, self.mesh, [Partial()] * self.mesh.ndim)
            return whole.redistribute(placements=p.placements).to(p.device)
        # One row a rank, of which everyone gets its columns.
        rows = DTensor.from_local(own.unsqueeze(0), self.mesh, [Shard(0)] * self.mesh.ndim)
        columns: list[Placement] = [Shard(q.dim + 1) if isinstance(q, Shard) else Replicate() for q in p.placements]
        merged = raw.joined(rows.redistribute(placements=columns).to_local().unbind())
        return DTensor.from_local(merged, self.mesh, p.placements, shape=p.shape, stride=p.stride()).to(p.device)

    def sizes(self, examples: int) -> Sizes:
        """How many examples every rank has, told how many this one has."""
        return Sizes(self, self._rows(torch.tensor([examples], device=self.mesh.device_type)))

    def concatenated(self, own: Tensor, lengths: Sequence[int]) -> list[Tensor]:
        """Flat tensors of all ranks, in their order, whose lengths everyone knows."""
        rows = self._rows(F.pad(own, (0, max(lengths) - len(own)))).view(len(lengths), -1)
        return [row[:length] for row, length in zip(rows, lengths, strict=True)]

    def largest(self, number: int) -> int:
        """Of the numbers that the ranks give. Waits for the device."""
        return int(self._rows(torch.tensor([number], device=self.mesh.device_type)).max())

    def _rows(self, own: Tensor) -> Tensor:
        return DTensor.from_local(own, self.mesh, [Shard(0)] * self.mesh.ndim).full_tensor()


def check(granularity: str, sums: Sequence[RawSum]) -> None:
    """Raises: GradstatsError for what a sharded model has no statistics of."""
    if granularity != "example":
        raise GradstatsError(
            f"granularity={granularity!r} is not for models sharded by fully_shard, whose ranks count examples: use "
            f"granularity='example'"
        )
    for raw in sums:
        if raw.per == "pair":
            raise GradstatsError(
                f"{raw.name!r} pairs examples, and those of different ranks never meet where a model is sharded: use "
                f"'projection', whose inner products estimate it"
            )


class Sizes:
    """Examples of every rank in one forward."""

    def __init__(self, shards: Shards, counts: Tensor):
        self.shards, self.counts = shards, counts

    @cached_property
    def of_ranks(self) -> list[int]:
        """In their order. Waits for the device."""
        return self.counts.tolist()

    @cached_property
    def total(self) -> int:
        """Waits for the device."""
        sizes = self.of_ranks
        if self.shards.loss_reduction == "mean" and len(set(sizes)) > 1 and not self.shards.warned:
            self.shards.warned = True
            warn_unequal("fully_shard", sizes)
        return sum(sizes)


def shards_of(model: nn.Module, loss_reduction: str) -> Shards | None:
    """The ranks that a model is sharded over by fully_shard; None if it is not.

    Raises: CoverageError for parameters that are distributed in another way.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    parameters = dict(model.named_parameters())
    sharded = {name: p for name, p in parameters.items() if isinstance(p, DTensor)}
    if not sharded:
        return None
    meshes = {p.device_mesh for p in sharded.values()}
    mesh = next(iter(meshes))
    if len(meshes) > 1:
        raise CoverageError(
            f"parameters are sharded over different meshes, {sorted(map(str, meshes))}, whose ranks see different "
            f"examples. fully_shard all of the model over one mesh"
        )
    managed = {p for module in model.modules() if isinstance(module, FSDPModule) for p in module.parameters()}
    for name, p in parameters.items():
        if name not in sharded and p.requires_grad:
            raise CoverageError(
                f"parameter '{name}' {tuple(p.shape)} is not sharded while others are: its gradients stay with the "
                f"rank. Call fully_shard on the module that contains it too, freeze it, or attach the sharded part"
            )
        if isinstance(p, DTensor) and (p not in managed or not data_parallel(p)):
            raise CoverageError(
                f"parameter '{name}' {tuple(p.shape)} is distributed as {p.placements} over {mesh}, and not by "
                f"fully_shard over one dimension of ranks, or over (replicas, shards): layers that compute with parts "
                f"of a parameter (tensor parallelism) are not covered. Attach the module that fully_shard was called on"
            )
    return Shards(model, mesh, loss_reduction)


def data_parallel(p: DTensor) -> bool:
    """Whether a parameter is sharded over the last dimension of its mesh and replicated over the one before, if there
    is one."""
    kinds = [type(placement) for placement in p.placements]
    return kinds in ([Shard], [Replicate, Shard])


def refuse_nested(module: nn.Module) -> None:
    """Raises: CoverageError for a vmap leaf that would gather parameters for each example."""
    inside = [name for name, child in module.named_modules() if isinstance(child, FSDPModule) and child is not module]
    if inside:
        raise refuse(
            module,
            f"it has no rule, or uses a parameter outside of its layer, and would run under torch.func.vmap, but "
            f"fully_shard was called on '{inside[0]}' inside of it",
            "Call fully_shard on this module and on nothing inside of it",
        )


def refuse_late(model: nn.Module) -> None:
    """Raises: CoverageError for a model that was sharded after it was attached."""
    if is_sharded(model):
        raise CoverageError(
            f"{type(model).__name__} was attached before fully_shard, which puts other parameters in place of its own: "
            f"call fully_shard first, then gradstats.attach(model), and make the optimizer after that"
        )


def is_sharded(model: nn.Module) -> bool:
    """Whether fully_shard was called on the model, or inside of it."""
    return any(isinstance(module, FSDPModule) for module in model.modules())
