import math

import pytest
import torch
from torch import nn

from experiments.laboratory.adam_and_friends.race import METHODS, SIDES, build, race
from gradstats.optim.base import ExampleOptimizer

TASK = {"data": "digits", "path": None, "test_fraction": 0.2, "split_seed": 0}
MODEL = {"widths": "8", "normalisation": "none", "dropout": 0.0}
SMALL = {"batch_size": 32, "steps": 20, "every": 5, "seed": 0, **TASK, **MODEL}


@pytest.mark.parametrize("method", METHODS)
def test_ours_and_both_forms_of_torch_are_one_algorithm(method: str) -> None:
    lr = METHODS[method].lr
    curves = [race(method, side, lr, double=True, **SMALL) for side in SIDES]  # type: ignore[arg-type]
    for found in curves:
        assert found["steps"] == [0, 5, 10, 15, 20]
        assert found["loss"] == pytest.approx(curves[0]["loss"], abs=1e-12)
        assert found["loss"][-1] < found["loss"][0]


def test_methods_are_different_algorithms() -> None:
    losses = [race(method, "torch", 0.01, double=True, **SMALL)["loss"][-1] for method in METHODS]  # type: ignore[arg-type]
    assert len({round(loss, 6) for loss in losses}) == len(METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_sides_are_what_they_are_called(method: str) -> None:
    parameters = list(nn.Linear(2, 2).parameters())
    built = {side: build(method, side, parameters, 0.1, 32) for side in SIDES}
    assert isinstance(built["ours"], ExampleOptimizer) and built["ours"].param_groups[0]["batch_size"] == 32
    assert built["torch_loop"].param_groups[0]["foreach"] is False
    assert type(built["torch"]) is type(built["torch_loop"])
    assert built["torch"].param_groups[0].get("fused") == (None if method == "rmsprop" else True)


def test_only_steps_are_on_the_clock() -> None:
    found = race("sgd", "torch", 0.1, double=False, **SMALL)  # type: ignore[arg-type]
    assert found["seconds"][0] == 0 and found["seconds"] == sorted(found["seconds"])
    assert 0 < found["step"] <= found["seconds"][-1]


def test_full_batch_descent_does_not_depend_on_the_order_of_examples() -> None:
    found = [race("full_batch", "torch", 0.1, double=True, **SMALL | {"batch_size": b}) for b in (16, 32)]  # type: ignore[arg-type]
    assert found[0]["loss"] == found[1]["loss"]


def test_what_is_not_finite_has_no_loss() -> None:
    found = race("momentum", "torch", 1e30, double=False, **SMALL)  # type: ignore[arg-type]
    assert math.isfinite(found["loss"][0]) and found["loss"][-1] is None


def test_the_widths_and_the_precision_are_those_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[nn.Parameter] = []

    def sgd(ps: list[nn.Parameter], lr: float, **form: bool) -> torch.optim.Optimizer:
        seen.extend(ps)
        return torch.optim.SGD(ps, lr)

    monkeypatch.setitem(METHODS, "sgd", METHODS["sgd"].__class__("SGD", 0.1, sgd, METHODS["sgd"].ours))
    race("sgd", "torch", 0.1, double=True, **SMALL | {"widths": "8x4", "steps": 5})  # type: ignore[arg-type]
    assert [tuple(p.shape) for p in seen if p.ndim == 2] == [(8, 64), (4, 8), (10, 4)]
    assert {p.dtype for p in seen} == {torch.float64}
