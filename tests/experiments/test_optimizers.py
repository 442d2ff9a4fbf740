"""The rules against the formulas of their papers, written out for k = 4."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch

from experiments.config import compose_config
from experiments.errors import UserError
from experiments.optimizers import (
    Hyperparameters,
    build_optimizer,
    fixed,
    half_life,
    linear,
    needs_statistics,
    square_root,
)
from gradstats.optim import BatchInvariantAdam

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
    assert type(optimizer) is kind and not needs_statistics(config)
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
    assert isinstance(optimizer, BatchInvariantAdam) and needs_statistics(config)
    assert optimizer.param_groups[0]["lr"] == 0.03
    assert config.reference_batch_size == reference


def test_refused_values_name_the_method() -> None:
    config = compose_config(["optimizer=adam", "optimizer.betas=[1.5,0.9]"]).optimizer
    with pytest.raises(UserError, match="optimizer=adam: .*1.5"):
        build_optimizer([torch.zeros(2, requires_grad=True)], config, 16, None)
