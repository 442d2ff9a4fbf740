"""FSDP2: what cannot be right is refused, with the way out."""

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import gradstats
from gradstats.errors import CoverageError, GradstatsError
from tests.gradstats.distributed.sharding import batches, line, loss_of, mine, mlp, shard


def attached_before():
    for steps in (0, 2):
        model = mlp().double()
        gradstats.attach(model)
        x, y = next(batches("mlp", 1))
        for _ in range(steps):
            loss_of(model(x), y).backward()
            model.zero_grad()
        shard(model)
        with pytest.raises(CoverageError, match="call fully_shard first"):
            model(mine(x))


def sharded_in_part():
    model = mlp().double()
    fully_shard(model[2], mesh=line())
    with pytest.raises(CoverageError, match=r"'0.weight' \(7, 5\) is not sharded"):
        gradstats.attach(model)
    model[0].requires_grad_(False)
    model[3].requires_grad_(False)
    stats = gradstats.attach(model)
    x, y = next(batches("mlp", 1))
    loss_of(model(mine(x)), mine(y)).backward()
    assert [*stats.second_moment] == ["2.0.weight", "2.0.bias"]


def an_inner_module():
    model = fully_shard(mlp().double(), mesh=line())
    with pytest.raises(CoverageError, match="Attach the module that fully_shard was called on"):
        gradstats.attach(model[2])


def tensor_parallel():
    model = nn.Sequential(nn.Linear(4, 4)).double()
    parallelize_module(model, line(), {"0": ColwiseParallel()})
    with pytest.raises(CoverageError, match="tensor parallelism"):
        gradstats.attach(model)


def options():
    model = shard(mlp().double())
    for statistics, attachment, why in [
        (("gram",), {}, "'projection'"),
        (("cosine_similarity",), {}, "'projection'"),
        ((), {"engine": "microbatch"}, "engines other than"),
        ((), {"engine": "random_sign"}, "engines other than"),
        ((), {"engine": "opacus"}, "engines other than"),
        ((), {"granularity": "token"}, "granularity='example'"),
        ((), {"granularity": "microbatch", "microbatch_size": 2}, "granularity='example'"),
        ((), {"follow_clipping": True}, "stats.clip_grad_norm_"),
        ((), {"grad_scaler": torch.amp.GradScaler("cpu")}, "bfloat16"),
        ((), {"engine": "vmap"}, "fully_shard was called on '2' inside of it"),
    ]:
        with pytest.raises(GradstatsError, match=why):
            gradstats.attach(model, *statistics, **attachment)
    gradstats.attach(model)  # nothing is left of these


def functions_of_a_model():
    model = shard(mlp().double())
    x, y = next(batches("mlp", 1))
    for function in (gradstats.verify, gradstats.per_example_gradients):
        with pytest.raises(GradstatsError, match="before fully_shard"):
            function(model, loss_of, mine(x), mine(y))
    assert gradstats.compute(model, loss_of, mine(x), mine(y)).batch_size == len(x)


@pytest.mark.parametrize(
    "case",
    [attached_before, sharded_in_part, an_inner_module, tensor_parallel, options, functions_of_a_model],
)
def test_refused(two, case):
    two(case)
