"""Shapes are those that the table names, losses are those of single examples."""

from __future__ import annotations

import pytest
import torch

from experiments.benchmarks.workloads import SCALES, WORKLOADS, Settings, find, point

SIZES = {  # parameters, and what the loss reads
    "mlp": (784 * 1024 + 1024 * 1024 + 1024 * 10 + 2058, (256, 784)),
    "resnet18": (11_173_962, (64, 3, 32, 32)),  # ResNet-18 for CIFAR: its norms have as many as BatchNorm's
    "gpt": (4 * 12 * 256**2 + 4 * 13 * 256 + 512 + (256 + 128) * 256 + 257 * 256, (16, 128)),
    "gpt2_block": (12 * 768**2 + 13 * 768, (4, 256, 768)),
    "linear_t4": (2 * (1024**2 + 1024), (64, 4, 1024)),
    "linear_t16": (2 * (1024**2 + 1024), (64, 16, 1024)),
    "gpt2_small": (124_439_808, (32, 1024)),
}


@pytest.mark.parametrize("name", SIZES)
def test_shapes(name: str) -> None:
    problem = WORKLOADS[name].problem(Settings(device="meta"))
    assert (sum(p.numel() for p in problem.parameters().values()), tuple(problem.x.shape)) == SIZES[name]


@pytest.mark.parametrize("name", [*WORKLOADS, *(point(scale, 8) for scale in SCALES)])
def test_losses_are_those_of_single_examples(name: str, settings: Settings) -> None:
    problem, again = find(name).problem(settings), find(name).problem(settings)
    losses = problem.losses_of(problem.model, problem.x, problem.y)
    assert losses.shape == problem.x.shape[:1] and losses.unique().numel() == len(losses)
    torch.testing.assert_close(losses, again.losses_of(again.model, again.x, again.y), rtol=0, atol=0)
    alone = problem.losses_of(problem.model, problem.x[1:2], problem.y[1:2])
    torch.testing.assert_close(losses[1:2], alone)


@pytest.mark.parametrize("name", SCALES)
def test_a_scale_changes_one_size(name: str, settings: Settings) -> None:
    scale = SCALES[name]
    first, *_, last = scale.points(settings)
    shapes = [find(point(name, value)).shaped(settings) for value in (first, last)]
    assert [key for key in shapes[0] if shapes[0][key] != shapes[1][key]] == [scale.symbol]
    assert shapes[1][scale.symbol] == last
    assert {*scale.values, *scale.quick} == set(scale.every())


def test_low_precision_is_autocast() -> None:
    problem = WORKLOADS["mlp"].problem(Settings(quick=True, dtype=torch.bfloat16))
    assert {p.dtype for p in problem.parameters().values()} == {torch.float32}
    with problem.autocast():
        assert problem.model(problem.x).dtype == torch.bfloat16
