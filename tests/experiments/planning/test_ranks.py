"""Bytes of a rank by formula, beside those that a small step takes."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from experiments.benchmarks.meter import Profiled
from experiments.capacity import step_memory, training_step
from experiments.config import compose_config
from experiments.data import load_data
from experiments.errors import UserError
from experiments.models import build_model
from experiments.optimizer_benchmark import METHODS
from experiments.planning.layers import price
from experiments.planning.live import Live
from experiments.planning.ranks import Memory, Traffic, elementwise, memory, traffic
from experiments.planning.setting import Setting, examples_of, setting
from experiments.planning.trace import plain
from experiments.schemas.run import Config
from gradstats.engines.fused import FusedHandle
from gradstats.handle import handle_of

CPU = torch.device("cpu")
RANKS = 4
GPT = ("data=topics", "data.limit=400", "model=gpt", "model.width=64", "model.tied=true")


@pytest.fixture(autouse=True)
def _no_garbage() -> None:
    """What another test has left would be freed in the middle of a measurement."""
    gc.collect()


def planned(config: Config, world_size: int = 1, sharded: bool = False) -> tuple[Memory, list[Traffic]]:
    with FakeTensorMode():
        one = setting(config, world_size, sharded)
        step = plain(one.model, one.loss)
        return memory(one, step, price(step.calls, one.sums)), traffic(one, config.engine.every)


def composed(*overrides: str) -> Config:
    return compose_config(["tracker=none", *overrides])


@pytest.mark.parametrize(
    ("overrides", "batch_size"),
    [
        (("model.widths=[256]", "optimizer=batch_invariant_rmsprop"), 16),  # the optimizer's step is the peak
        (("model.widths=[512,512]", "optimizer=saturating_adam"), 16),
        (("model.widths=[512,512]", "model.dropout=0"), 256),
        (("model=convnet",), 64),
        (GPT, 8),
        ((*GPT, "model.checkpoint=true", "optimizer.reference_batch_size=64"), 16),
        ((*GPT, "model.checkpoint=true", "hardware.bf16=true"), 8),
        (("optimizer=adam", "model.widths=[512,512]", "model.dropout=0"), 16),
    ],
)
def test_memory_of_one_process_is_what_a_step_takes(overrides: tuple[str, ...], batch_size: int) -> None:
    config = composed(*overrides, f"train.batch_size={batch_size}")
    found, _ = planned(config)
    assert found.peak == pytest.approx(step_memory(config, load_data(config.data, CPU), CPU, batch_size), rel=0.08)
    assert found.communication == 0


# One of each kind; R is above B, where some keep more.
KINDS = {type(compose_config([f"optimizer={name}"]).optimizer): name for name in METHODS if "microbatch" not in name}


@pytest.mark.parametrize("name", [*KINDS.values(), "batch_invariant_adam_amsgrad", "sgd_linear"])
def test_state_is_what_the_optimizer_keeps(name: str) -> None:
    config = composed(f"optimizer={name}", "model.widths=[]", "train.batch_size=8")
    with FakeTensorMode():
        expected = sum(setting(config, 1, False).state().values())
    step = training_step(config, load_data(config.data, CPU), CPU, 8)
    kept: list[torch.optim.Optimizer] = []
    hook = register_optimizer_step_post_hook(lambda optimizer, *_: kept.append(optimizer))
    step()
    hook.remove()
    assert expected == sum(t.nbytes for s in kept[0].state.values() for t in s.values() if isinstance(t, Tensor))


@pytest.fixture
def group() -> Iterator[None]:
    """Several ranks, of which one is here, and collectives that do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    yield
    dist.destroy_process_group()


class Collectives(TorchDispatchMode):
    """Bytes of the whole tensors that they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            tensors = [t for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, Tensor)]
            self.sizes[func._schema.name.partition("::")[2]] += max(t.nbytes for t in tensors)
        return func(*args, **(kwargs or {}))


def gpt(batch_size: int, *overrides: str) -> Config:
    """A file of tokens that nobody reads."""
    sizes = ("data.context=16", "data.words=64", "model=gpt", "model.width=128", "model.layers=4")
    return composed("data=tokens", *sizes, f"train.batch_size={batch_size}", *overrides)


def take(model: nn.Module, rows: int) -> None:
    x = torch.zeros(rows, 16, dtype=torch.long)
    F.cross_entropy(model(x).flatten(0, -2), x.flatten()).backward()


def model_of(config: Config) -> nn.Module:
    return build_model(config.model, (16,), 64, discrete=True)


@pytest.mark.usefixtures("group")
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor:UserWarning")
def test_sharding_of_plain_torch() -> None:
    config = gpt(4 * RANKS, "optimizer=adam")
    mesh = init_device_mesh("cpu", (RANKS,))
    meter, rows = Profiled(), 4
    with meter.contestant():
        model = model_of(config)
        for block in model.blocks:  # type: ignore[union-attr]
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        for _ in range(2):
            take(model, rows)
            model.zero_grad()
        with meter.steps():
            take(model, rows)
    found, sent = planned(config, RANKS, sharded=True)
    # At most: not all that may be whole at a time is at the peak.
    assert meter.peak <= found.peak - found.optimizer_state <= 1.3 * meter.peak
    model.zero_grad()
    with Collectives() as counted:
        take(model, rows)
    gathered, scattered = (counted.sizes[name] for name in ("_allgather_base_", "_reduce_scatter_base_"))
    assert sent == [Traffic("all-gather", gathered, 0), Traffic("reduce-scatter", scattered, 0)]


@pytest.mark.usefixtures("group")
def test_buckets_of_plain_torch() -> None:
    config, rows = gpt(4 * RANKS, "optimizer=adam"), 4
    found, sent = planned(config, RANKS)
    reduced: list[int] = []

    def reduce(state, bucket):  # DDP would insist on what annotations are, and not say
        reduced.append(bucket.buffer().nbytes)
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    meter = Profiled()
    with meter.contestant():
        model = DistributedDataParallel(model_of(config))
        model.register_comm_hook(None, reduce)
        for _ in range(2):
            take(model, rows)
            model.zero_grad()
        reduced.clear()
        with meter.steps():
            take(model, rows)
    assert sent == [Traffic("all-reduce", sum(reduced), 0)]
    assert found.peak - found.optimizer_state == pytest.approx(meter.peak, rel=0.02)
    assert found.communication == sum(reduced)
    # Sums lie in copies of the buckets.
    gathered, _ = planned(gpt(4 * RANKS), RANKS)
    assert gathered.communication == 2 * sum(reduced)


@pytest.mark.parametrize("overrides", [(), ("hardware.bf16=true",), ("tracker.detail=true",)])
def test_sums_that_travel_are_those_of_the_shadows(overrides: tuple[str, ...]) -> None:
    config = composed("train.batch_size=6", *overrides)
    step = training_step(config, load_data(config.data, CPU), CPU, 6)
    found: list[FusedHandle] = []
    hook = register_optimizer_step_pre_hook(
        lambda optimizer, *_: found.append(handle_of(optimizer.param_groups[0]["params"][0]))  # type: ignore[arg-type]
    )
    step()
    hook.remove()
    accounts = [a for leaf in found[0].leaves for a in leaf.accounts.values()]
    shadows = sum(s.grad.nbytes for a in accounts for s in a.shadows.values() if s.grad is not None)
    with FakeTensorMode():
        one = setting(config, 2, False)
        assert elementwise(one) == shadows > 0
        assert traffic(one, 1)[0].extra == shadows and traffic(one, 4)[0].extra == shadows / 4


def test_a_rank_has_its_share_of_the_batch() -> None:
    with FakeTensorMode():
        one: Setting = setting(composed("train.batch_size=10"), 4, False)
        assert (one.batch_size, one.rows) == (10, 3)
    alone, several, sharded = (planned(composed("train.batch_size=10"), *ranks)[0] for ranks in ((1,), (4,), (4, True)))
    assert several.activations < alone.activations / 2
    for name in ("parameters", "gradients", "statistics", "optimizer_state"):
        assert getattr(several, name) == getattr(alone, name)
        assert getattr(alone, name) / 4 <= getattr(sharded, name) < getattr(alone, name) / 3.5


def test_only_plain_autocast_keeps_what_it_casts() -> None:
    low, peaks = (*GPT, "model.checkpoint=true", "hardware.bf16=true"), []
    for optimizer in ("adam", "batch_invariant_adam"):
        with FakeTensorMode():
            one = setting(composed(*low, f"optimizer={optimizer}"), 1, False)
            with Live(known=one.parameters) as live:
                one.loss()
            peaks.append(live.peak)
    cast = 2 * sum(m.weight.numel() for m in one.model.modules() if isinstance(m, nn.Linear))
    assert cast / 2 < peaks[0] - peaks[1] <= cast  # of what is at work both have a copy


@pytest.mark.parametrize("data", ["mnist", "cifar10"])
def test_images_are_not_fetched_to_know_their_shape(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.planning.setting.load_data", None)
    found = examples_of(compose_config([f"data={data}"]).data, 7)
    assert (found.x.shape, found.classes) == ((7, 1, 28, 28) if data == "mnist" else (7, 3, 32, 32), 10)


@pytest.mark.parametrize(
    ("overrides", "world_size", "message"),
    [
        ((), 0, "world_size=0 must be positive"),
        ((), 32, "train.batch_size=16 is the batch of all 32 ranks together"),
        (("engine.fraction=0.5",), 1, "formulas are of engine=fused and all examples"),
        (("engine=vmap",), 1, "formulas are of engine=fused and all examples"),
        (("optimizer=microbatch_adamw",), 1, "optimizer=microbatch_adamw: formulas are of statistics of examples"),
        (("train.batch_size=0",), 1, "train.batch_size=0 must be positive"),
    ],
)
def test_what_no_plan_is_for(overrides: tuple[str, ...], world_size: int, message: str) -> None:
    with pytest.raises(UserError, match=message), FakeTensorMode():
        setting(composed(*overrides), world_size, False)
