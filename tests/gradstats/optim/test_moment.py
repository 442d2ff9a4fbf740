"""Adam with every source, estimator, average and denominator, against a twin; and the limits of the family."""

import pytest
import torch

from gradstats import attach
from gradstats.optim import BatchInvariantAdam, BatchInvariantRMSprop, BatchInvariantSGD
from tests.gradstats.optim import reference
from tests.gradstats.optim.problem import problem, train
from tests.gradstats.optim.quartic import compare

TUNED = 8
INF = float("inf")


DEFAULTS = {
    "source": "second_moment",
    "estimator": "previous",
    "average": "debiased_ewma",
    "amsgrad": False,
    "denominator": "adam",
}


@pytest.mark.parametrize(
    ("r", "options"),
    [
        *((r, {"estimator": estimator}) for r in (1, 8, 100, INF) for estimator in ("running_average", "in_batch")),
        *((r, {"average": average}) for r in (1, 100) for average in ("mean", "ewma", "slides")),
        *((r, {"source": "variance", "estimator": e}) for r in (1, 8) for e in ("running_average", "previous")),
        (8, {"source": "mean_square"}),
        (8, {"source": "mean_square", "estimator": "in_batch"}),
        (8, {"source": "squared_batch_mean"}),
        (INF, {"average": "ewma"}),
        *((r, {"amsgrad": True, "average": average}) for r in (8, 100) for average in ("debiased_ewma", "ewma")),
        (1, {"denominator": "slides"}),
    ],
)
@pytest.mark.parametrize("l2", [0.0, 0.1])
def test_adam_follows_its_equations(r, options, l2):
    chosen = DEFAULTS | options
    numbers = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 0.1 if chosen["denominator"] == "slides" else 1e-3}
    decay = {"weight_decay": l2, "decoupled_weight_decay": False}
    compare(
        lambda ps: BatchInvariantAdam(ps, **numbers, **chosen, **decay, reference_batch_size=r, batch_size=TUNED),
        lambda p: reference.Adam(p, **numbers, **chosen, weight_decay=0, l2=l2, reference=r, batch_size=TUNED),
    )


@pytest.mark.parametrize("kind", [BatchInvariantAdam, BatchInvariantRMSprop])
def test_a_batch_of_the_reference_size_reads_no_squares(kind):
    """v_B = m^2, unless q~ goes on; a single example's v_1 = q."""

    def reads(r, b, state=()):
        optimizer = kind([torch.zeros(1)], batch_size=TUNED, reference_batch_size=r)
        return optimizer.update(optimizer.param_groups[0], b, dict.fromkeys(state)).reads

    assert reads(8, 8) == reads(64, 64) == ()
    for r, b, state in ((8, 4, ()), (8, 16, ()), (8, 8, ("exp_avg_q",)), (1, 1, ()), (1, 8, ())):
        assert reads(r, b, state) == ("sum_of_squares",)


def test_the_slides_lr_is_that_of_sgd():
    """lr m~ / (1 + sqrt(s)/eps) for a large eps."""
    results = []
    for make in (
        lambda ps: BatchInvariantAdam(
            ps, lr=0.1, betas=(0.9, 0.99), eps=1e14, denominator="slides", batch_size=16, reference_batch_size=1
        ),
        lambda ps: BatchInvariantSGD(ps, lr=0.1, momentum=0.9, dampening=0.9, average="debiased_ewma", batch_size=16),
    ):
        model, x, y = problem()
        attach(model)
        results.append(train(model, make(model.parameters()), x, y, [16, 3, 64, 1] * 5))
    torch.testing.assert_close(*results, rtol=0, atol=1e-11)
