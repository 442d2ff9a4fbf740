"""max_norm: the norm that is bounded, and over what."""

import torch
from torch import nn

from gradstats import attach
from gradstats.optim import (
    BatchInvariantAdam,
    BatchInvariantSGD,
)
from tests.gradstats.optim.problem import problem, train, vector


def test_max_norm_bounds_the_gradient_and_leaves_coupled_decay():
    model, x, y = problem()
    theirs, _, _ = problem()
    attach(model)
    options = {"lr": 0.1, "weight_decay": 0.5}
    optimizer = BatchInvariantSGD(
        model.parameters(), batch_size=8, max_norm=0.01, decoupled_weight_decay=False, **options
    )
    a = train(model, optimizer, x, y, [8])
    plain = torch.optim.SGD(theirs.parameters(), **options)
    before = lambda: nn.utils.clip_grad_norm_(theirs.parameters(), 0.01)  # noqa: E731
    b = train(theirs, plain, x, y, [8], before=before)
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_norms_do_not_overflow_in_half_precision():
    p = nn.Parameter(torch.ones(1000, dtype=torch.float16))
    p.grad = torch.full_like(p, 3000.0)
    BatchInvariantSGD([p], lr=1e-3, batch_size=1, max_norm=1e3).step(batch_size=1)
    step = 1e-3 * 1e3 / 1000**0.5
    assert abs(float(1 - p.detach()[0]) - step) < 1e-3


def test_max_norm_bounds_the_step_where_the_average_is_its_own_floor():
    """R = inf: m~ is in the numerator and in the denominator."""
    model, x, y = problem()
    before = vector(model)
    attach(model)
    options = {"lr": 0.1, "batch_size": 8, "reference_batch_size": float("inf")}
    after = train(model, BatchInvariantAdam(model.parameters(), max_norm=1e-6, **options), x, y, [8, 8])
    free, _, _ = problem()
    attach(free)
    unbounded = train(free, BatchInvariantAdam(free.parameters(), **options), x, y, [8, 8])
    assert (after - before).norm() < 1e-4 * (unbounded - before).norm()
