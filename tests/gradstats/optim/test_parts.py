"""Parameters whose steps have something in common, and others."""

import pytest
import torch

from gradstats import attach
from gradstats.optim import BatchInvariantAdam, BatchInvariantRMSprop, BatchInvariantSGD
from tests.gradstats.optim.problem import problem, train
from tests.gradstats.optim.quartic import Quartic


def test_groups_count_examples():
    model, x, y = problem()
    attach(model)
    optimizer = BatchInvariantAdam(
        [{"params": model[0].parameters()}, {"params": model[3].parameters()}], batch_size=16
    )
    model[3].requires_grad_(False)
    train(model, optimizer, x, y, [8, 4])
    assert [group["examples"] for group in optimizer.param_groups] == [12, 0] and optimizer.examples == 12
    restored = BatchInvariantAdam([{"params": model[0].parameters()}, {"params": model[3].parameters()}], batch_size=16)
    restored.load_state_dict(optimizer.state_dict())
    assert restored.examples == 12


@pytest.mark.parametrize("compiled", [False, True])
def test_state_in_two_dtypes(compiled):
    """Compiled kernels take addresses: a column of mixed dtypes is not theirs."""
    results = []
    for mixed in (False, True):
        model, x, y = problem(torch.float32)
        attach(model)
        optimizer = BatchInvariantSGD(model.parameters(), momentum=0.9, batch_size=8, compiled=compiled)
        train(model, optimizer, x, y, [8])
        if mixed:
            state = optimizer.state[model[0].bias]
            state["momentum_buffer"] = state["momentum_buffer"].double()
        results.append(train(model, optimizer, x, y, [8]))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("kind", [BatchInvariantAdam, BatchInvariantRMSprop])
def test_a_model_with_statistics_of_some_examples_beside_another(kind, first):
    """They step as they would in optimizers of their own."""
    options = {"lr": 0.01, "batch_size": 4, "reference_batch_size": 1, "average": "debiased_ewma"}
    if kind is BatchInvariantAdam:
        options["betas"] = (0.0, 0.99)

    def trained(together):
        torch.manual_seed(0)
        models = Quartic(), Quartic()
        attach(models[0], fraction=0.5, generator=torch.Generator().manual_seed(0))
        attach(models[1])
        parameters = [models[first].p, models[1 - first].p]
        rows = [parameters] if together else [[p] for p in parameters]
        optimizers = [kind(row, **options) for row in rows]
        for scale in (1, 1, 10):  # the average of squares lags behind, and only the first model's is floored
            x = scale * torch.randn(4, 3, dtype=torch.float64)
            for model in models:
                model.zero_grad()
                model(x).mean().backward()
            for optimizer in optimizers:
                optimizer.step()
        return torch.stack([model.p.detach() for model in models])

    alone = trained(together=False)
    assert torch.equal(trained(together=True), alone) and not torch.equal(alone[0], alone[1])
