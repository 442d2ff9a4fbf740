"""The rules against the formulas of their papers, written out for k = 4."""

from __future__ import annotations

import functools
from dataclasses import asdict
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from experiments.config import CONF, compose_config
from experiments.errors import UserError
from experiments.optimizers import (
    OURS,
    Hyperparameters,
    attach_statistics,
    build_optimizer,
    fixed,
    half_life,
    linear,
    options,
    read_statistics,
    square_root,
    step_lr,
    stepper,
)
from experiments.schemas.optimizer import OPTIMIZERS, AdamConfig, OptimizerConfig, SGDConfig
from gradstats.optim import BatchInvariantAdam
from gradstats.optim.base import ExampleOptimizer

NAMES = sorted(path.stem for path in CONF.glob("optimizer/*.yaml"))
TUNED = Hyperparameters(lr=0.01, betas=(0.9, 0.999), eps=1e-8)

RULES = {
    fixed: Hyperparameters(0.01, (0.9, 0.999), 1e-8),
    linear: Hyperparameters(0.04, (0.9, 0.999), 1e-8),
    square_root: Hyperparameters(0.02, (0.6, 0.996), 0.5e-8),
    half_life: Hyperparameters(0.02, (0.9**4, 0.999**4), 1e-8),
}

TORCH = {
    "adam": (torch.optim.Adam, fixed),
    "adam_linear": (torch.optim.Adam, linear),
    "adam_square_root": (torch.optim.Adam, square_root),
    "adam_half_life": (torch.optim.Adam, half_life),
}


@pytest.mark.parametrize("rule", RULES)
def test_rule_at_four_times_the_batch_size(rule) -> None:
    scaled, expected = rule(TUNED, 4.0), RULES[rule]
    assert (scaled.lr, *scaled.betas, scaled.eps) == pytest.approx((expected.lr, *expected.betas, expected.eps))


@pytest.mark.parametrize("rule", RULES)
def test_rule_changes_nothing_at_the_batch_size_of_tuning(rule) -> None:
    scaled = rule(TUNED, 1.0)
    assert (scaled.lr, *scaled.betas, scaled.eps) == pytest.approx((TUNED.lr, *TUNED.betas, TUNED.eps), rel=1e-12)


def test_square_root_rule_has_no_negative_beta() -> None:
    assert square_root(TUNED, 16.0).betas == pytest.approx((0.0, 0.984))


@pytest.mark.parametrize("name", TORCH)
def test_torch_optimizers_get_the_values_of_their_rule(name: str) -> None:
    kind, rule = TORCH[name]
    config = compose_config([f"optimizer={name}"]).optimizer
    optimizer = build_optimizer([torch.zeros(2, requires_grad=True)], config, 4 * config.batch_size, None)
    expected = asdict(rule(Hyperparameters(config.lr, tuple(config.betas), config.eps), 4.0))
    assert type(optimizer) is kind and read_statistics(optimizer) == ()
    assert {key: optimizer.param_groups[0][key] for key in expected} == expected


def test_sgd_moves_by_the_batch_size_times_lr() -> None:
    config = compose_config(["optimizer=sgd_linear", "optimizer.lr=0.16"]).optimizer
    parameter = torch.zeros(1, requires_grad=True)
    parameter.grad = torch.ones(1)
    build_optimizer([parameter], config, 64, None).step()
    assert parameter.item() == pytest.approx(-64 * 0.01)


@pytest.mark.parametrize(("name", "reference"), [("batch_invariant_adam", None), ("batch_invariant_adam_r1", 1)])
def test_ours_gets_the_tuned_values_as_they_are(name: str, reference: int | None) -> None:
    config = compose_config([f"optimizer={name}", "optimizer.lr=0.03"]).optimizer
    optimizer = build_optimizer([torch.zeros(2, requires_grad=True)], config, 64, 1.0)
    assert isinstance(optimizer, BatchInvariantAdam) and read_statistics(optimizer) == ("second_moment",)
    assert optimizer.param_groups[0]["lr"] == 0.03 and optimizer.param_groups[0]["max_norm"] == 1.0
    assert config.reference_batch_size == reference


def test_refused_values_name_the_method() -> None:
    config = compose_config(["optimizer=adam", "optimizer.betas=[1.5,0.9]"]).optimizer
    with pytest.raises(UserError, match="optimizer=adam: .*1.5"):
        build_optimizer([torch.zeros(2, requires_grad=True)], config, 16, None)


@functools.cache
def tuned(name: str) -> OptimizerConfig:
    return compose_config([f"optimizer={name}"]).optimizer


def two_steps(name: str, batch_size: int) -> tuple[torch.optim.Optimizer, list[torch.Tensor]]:
    """Of a linear model of four inputs, at the batch size of tuning or another; the parameters after each."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    config = tuned(name)
    optimizer = build_optimizer(model.parameters(), config, batch_size, None)
    statistics = attach_statistics(model, optimizer, config)
    step = stepper(optimizer, batch_size if statistics is None else None)
    trajectory = [model.weight.detach().clone()]
    for _ in range(2):
        model.zero_grad()
        F.cross_entropy(model(torch.randn(batch_size, 4)), torch.randint(0, 3, (batch_size,))).backward()
        step()
        trajectory.append(model.weight.detach().clone())
    return optimizer, trajectory


@pytest.mark.parametrize("batch_size", [16, 4])
@pytest.mark.parametrize("name", NAMES)
def test_every_method_takes_two_steps(name: str, batch_size: int) -> None:
    optimizer, trajectory = two_steps(name, batch_size)
    for before, after in pairwise(trajectory):
        assert after.isfinite().all() and not torch.equal(before, after)
    if isinstance(optimizer, ExampleOptimizer):
        microbatch = 4 if name == "microbatch_adamw" else 1
        assert optimizer.examples == 2 * batch_size // microbatch


def test_torchs_momentum_is_scaled_in_its_lr_alone() -> None:
    (group,) = build_optimizer([torch.zeros(2, requires_grad=True)], tuned("sgd_momentum"), 64, None).param_groups
    assert (group["lr"], group["momentum"]) == (pytest.approx(4 * 2.5e-2), 0.9)


def test_ours_differ_in_what_they_are_built_with() -> None:
    """No file of conf/optimizer is another one under a new name."""
    ours = [config for config in map(tuned, NAMES) if type(config) in OURS]
    built = {(type(config), str(options(config))) for config in ours}
    assert len(built) == len(ours) > 20


def test_every_schema_is_built_by_somebody() -> None:
    assert set(OPTIMIZERS.values()) == {*OURS, AdamConfig, SGDConfig}


@pytest.mark.parametrize("name", ["batch_invariant_sgd", "batch_invariant_sign_sgd", "microbatch_adamw"])
def test_attach_gathers_what_the_optimizer_reads(name: str) -> None:
    config = tuned(name)
    model = nn.Linear(4, 3)
    optimizer = build_optimizer(model.parameters(), config, 16, None)
    handle = attach_statistics(model, optimizer, config, "norms")
    assert handle is not None and set(handle.statistics) == {*read_statistics(optimizer), "norms"}
    assert (handle.granularity, handle.microbatch_size) == (
        ("microbatch", 4) if name == "microbatch_adamw" else ("example", None)
    )


@pytest.mark.parametrize(
    ("batch_size", "more", "engine"), [(1, [], "microbatch"), (1, ["norms"], "fused"), (4, [], "fused")]
)
def test_a_batch_of_one_example_is_its_own_micro_batch(batch_size: int, more: list[str], engine: str) -> None:
    config, model = tuned("batch_invariant_adam"), nn.Linear(4, 3)
    optimizer = build_optimizer(model.parameters(), config, batch_size, None)
    handle = attach_statistics(model, optimizer, config, *more, batch_size=batch_size)
    x = torch.randn(batch_size, 4)
    model(x).square().sum(1).mean().backward()
    assert handle is not None and engine in type(handle).__name__.lower()
    d = 2 * model(x).detach()
    torch.testing.assert_close(handle.second_moment["weight"], d.square().T @ x.square() / batch_size)


def test_a_bound_that_nothing_has_a_norm_for_is_refused() -> None:
    config = compose_config(["optimizer=batch_invariant_lion"]).optimizer
    with pytest.raises(UserError, match=r"optimizer=batch_invariant_lion: .*train.max_norm=null"):
        build_optimizer([torch.zeros(2, requires_grad=True)], config, 16, 1.0)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("adam", 0.008),
        ("adam_linear", 0.032),
        ("sgd_linear", None),
        ("batch_invariant_adam", 0.032),
        ("adascale", None),
    ],
)
def test_the_lr_of_a_step_is_that_at_the_runs_batch_size(method: str, expected: float | None) -> None:
    """Four times the batch size of tuning; AdaScale's is by its gain, which is 1 to 4."""
    config = compose_config([f"optimizer={method}"]).optimizer
    optimizer = build_optimizer([nn.Parameter(torch.zeros(2))], config, 4 * config.batch_size, None)
    lr = optimizer.param_groups[0]["lr"]
    optimizer.param_groups[0]["lr"] = 0.0  # as a schedule leaves it
    found = step_lr(optimizer, config, lr, 4 * config.batch_size)
    if method == "adascale":
        assert config.lr <= found <= 4 * config.lr
    else:
        assert found == pytest.approx(expected or 4 * config.lr)
