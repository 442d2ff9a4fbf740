"""From a configuration to what one rank trains: model, batch and optimizer on tensors without memory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from experiments.config import check_ranges
from experiments.data import load_data
from experiments.data.openml import SOURCES
from experiments.errors import UserError
from experiments.models import build_model
from experiments.optimizers import build_optimizer, read_statistics
from experiments.planning.layers import Spec
from experiments.planning.live import Live
from experiments.planning.trace import clear
from experiments.schemas.data import DataConfig, ImagesConfig, TokensConfig
from experiments.schemas.optimizer import MicrobatchAdamWConfig
from experiments.schemas.run import Config
from gradstats.optim.base import ExampleOptimizer
from gradstats.optim.elementwise import run
from gradstats.optim.found import Found, Members, Row, state_of
from gradstats.optim.parts import parts_of
from gradstats.statistics import statistic_of
from gradstats.sums import SUMS, RawSum
from gradstats.window import Window

PLAIN = "plain torch"  # of an optimizer's path
STAND_INS = {"step": 1.0, "factor": 1.0}  # for scalars that take the numbers of all parameters


@dataclass(frozen=True)
class Examples:
    """Specs of a batch, and what a model must know of them."""

    x: Spec
    y: Spec
    classes: int

    @property
    def discrete(self) -> bool:
        return not self.x.dtype.is_floating_point


def examples_of(config: DataConfig, count: int) -> Examples:
    """Of data whose shapes the configuration tells, nothing is read."""
    if isinstance(config, TokensConfig):
        tokens = Spec((count, config.context), torch.int64)
        return Examples(tokens, tokens, config.words)
    if isinstance(config, ImagesConfig) and config.path is None and config.name in SOURCES:
        images = Spec((count, *SOURCES[config.name].shape), torch.float32)
        return Examples(images, Spec((count,), torch.int64), 10)
    data = load_data(config, torch.device("cpu"))
    x, y = data.train.take(torch.arange(1))
    return Examples(Spec((count, *x.shape[1:]), x.dtype), Spec((count, *y.shape[1:]), y.dtype), data.classes)


@dataclass(frozen=True)
class Setting:
    """batch_size: that of all ranks together; rows: the largest part of it that one rank has."""

    model: nn.Module
    optimizer: Optimizer
    loss: Callable[[], Tensor]
    sums: tuple[str, ...]  # that are gathered
    batch_size: int
    rows: int
    world_size: int
    sharded: bool

    @property
    def parameters(self) -> list[Tensor]:
        return list(self.model.parameters())

    @property
    def shards(self) -> int:
        return self.world_size if self.sharded else 1

    @property
    def elementwise(self) -> list[RawSum]:
        """Those of the sums that are shaped like the parameters."""
        return [SUMS[name] for name in self.sums if SUMS[name].per == "element"]

    def sums_of(self, p: Tensor) -> list[Tensor]:
        raws = [SUMS[name] for name in self.sums]
        return [torch.empty(raw.shape(self.rows, tuple(p.shape)), dtype=raw.dtype(p.dtype)) for raw in raws]

    def state(self) -> dict[Tensor, int]:
        """Bytes that the optimizer keeps, by parameter."""
        optimizer = self.optimizer
        if isinstance(optimizer, ExampleOptimizer):
            optimizer.allocate(self.batch_size)
        else:
            for p in self.parameters:
                p.grad = torch.zeros_like(p)
            optimizer.step()
        clear(self.model)
        return {p: sum(t.nbytes for t in optimizer.state[p].values() if isinstance(t, Tensor)) for p in self.parameters}

    def found(self, optimizer: ExampleOptimizer) -> list[Found]:
        """What a first step would find."""
        found = []
        for index, group in enumerate(optimizer.param_groups):
            rows: list[Row] = []
            for p in group["params"]:
                p.grad = torch.zeros_like(p)
                sums = dict(zip(self.sums, self.sums_of(p), strict=True))
                rows.append((p, p.grad, state_of(optimizer, p, group), sums))
            members = Members.of(rows)
            found.append(Found(index, Window(members.sums[0], None, self.batch_size, "mean"), members))
        return found

    def step(self) -> int:
        """Bytes that the optimizer's step has beside what it is given and keeps: none where it is one kernel."""
        optimizer = self.optimizer
        if not isinstance(optimizer, ExampleOptimizer) or not optimizer.path.startswith(PLAIN):
            return 0
        with torch.no_grad():
            parts = parts_of(optimizer, self.found(optimizer), loss_scale=1.0)
            with Live(known=[t for part in parts for column in part.columns.values() for t in column]) as live:
                for part in parts:
                    run(part.update, "both", part.columns, STAND_INS | part.scalars, compiled=False)
        clear(self.model)
        return live.peak


def setting(config: Config, world_size: int, sharded: bool) -> Setting:
    """Called under FakeTensorMode, but for data. Raises: UserError for what no run, or no formula, can do."""
    check_ranges(config)
    B = config.train.batch_size
    if world_size < 1:
        raise UserError(f"world_size={world_size} must be positive")
    if world_size > B:
        raise UserError(
            f"train.batch_size={B} is the batch of all {world_size} ranks together: give each of them an example"
        )
    if config.engine.name != "fused" or config.engine.fraction < 1:
        raise UserError("formulas are of engine=fused and all examples: engine=fused engine.fraction=1")
    if isinstance(config.optimizer, MicrobatchAdamWConfig):
        raise UserError(f"optimizer={config.optimizer.name}: formulas are of statistics of examples")
    rows = ceil(B / world_size)
    with torch.utils._python_dispatch._disable_current_modes():
        examples = examples_of(config.data, rows)
    model = build_model(config.model, tuple(examples.x.shape[1:]), examples.classes, examples.discrete)
    optimizer = build_optimizer(list(model.parameters()), config.optimizer, B, config.train.max_norm)
    detail = ("second_moment", "norms") if config.tracker.detail else ()
    needs = [raw.name for name in (*read_statistics(optimizer), *detail) for raw in statistic_of(name).needs]

    # Plain autocast keeps what it casts of the parameters during the forward; attached layers cast by themselves.
    low = torch.autocast("cpu", torch.bfloat16, cache_enabled=not needs)

    def loss() -> Tensor:
        with low if config.hardware.bf16 else nullcontext():
            return F.cross_entropy(model(examples.x.make()).flatten(0, -2), examples.y.make().flatten())

    return Setting(model, optimizer, loss, tuple(dict.fromkeys(needs)), B, rows, world_size, sharded)
