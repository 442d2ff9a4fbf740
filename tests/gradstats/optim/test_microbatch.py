"""MicrobatchAdamW: its equations on both engines, and where they are those of others."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gradstats import attach
from gradstats.optim import BatchInvariantAdam, MicrobatchAdamW
from tests.gradstats.optim.problem import problem, train, vector
from tests.gradstats.optim.quartic import Quartic

D = torch.float64
ARGS = {"lr": 0.02, "betas": (0.9, 0.97), "weight_decay": 0.1}


class Twin:
    """MicrobatchAdamW's docstring, line by line."""

    def __init__(self, p, lr, betas, weight_decay, batch_size, eps=1e-8):
        self.p, self.lr, self.betas, self.decay, self.b0, self.eps = p.clone(), lr, betas, weight_decay, batch_size, eps
        self.u1 = self.u2 = 0.0
        self.m = self.s = torch.zeros_like(p)

    def step(self, h):
        """h (M, *shape): mean gradients of the micro-batches."""
        k = len(h) / self.b0
        w1, w2 = (min(1, k * (1 - beta)) for beta in self.betas)
        self.u1 += (1 - self.u1) * w1
        self.u2 += (1 - self.u2) * w2
        self.m = (1 - w1 / self.u1) * self.m + w1 / self.u1 * h.mean(0)
        self.s = (1 - w2 / self.u2) * self.s + w2 / self.u2 * h.square().mean(0)
        self.p = self.p * (1 - self.lr * self.decay) ** k - k * self.lr * self.m / (self.s.sqrt() + self.eps)
        return self.p


@pytest.mark.parametrize("engine", ["fused", "microbatch"])
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("counts", [[1] * 20, [4] * 20, [1, 7, 2, 1, 30, 3, 1] * 3])
def test_follows_its_equations(engine, batch_size, counts):
    """At 30 micro-batches, m~ forgets all."""
    torch.manual_seed(2)
    model = Quartic()
    handle = attach(model, engine=engine, granularity="microbatch", microbatch_size=5)
    optimizer = MicrobatchAdamW(model.parameters(), batch_size=batch_size, **ARGS)
    twin = Twin(model.p.detach(), batch_size=batch_size, **ARGS)
    for m in counts:
        x = torch.randn(m, 5, 3, dtype=D)
        expected = twin.step(((model.p.detach() - x) ** 3).mean(1))
        optimizer.zero_grad()
        if engine == "fused":
            model(x.flatten(0, 1)).mean().backward()
        else:
            for x_i in x:
                (model(x_i).mean() / m).backward()
        assert handle.batch_size == 5 * m
        optimizer.step()
        assert (model.p - expected).abs().max() <= 1e-10
    assert optimizer.state[model.p]["step"] == optimizer.examples == sum(counts)


def test_one_micro_batch_is_torchs_adamw():
    model, x, y = problem()
    theirs = copy.deepcopy(model)
    attach(model, engine="microbatch", granularity="microbatch", microbatch_size=16)
    a = train(model, MicrobatchAdamW(model.parameters(), **ARGS), x, y, [16] * 100)
    b = train(theirs, torch.optim.AdamW(theirs.parameters(), **ARGS), x, y, [16] * 100)
    assert (a - b).abs().max() <= 1e-10


@pytest.mark.parametrize("batch_size", [1, 8])
def test_the_tuned_number_is_batch_invariant_adam(batch_size):
    results = []
    for kind, options in ((MicrobatchAdamW, {}), (BatchInvariantAdam, {"reference_batch_size": 1})):
        model, x, y = problem()
        attach(model, granularity="microbatch", microbatch_size=4)
        optimizer = kind(model.parameters(), batch_size=batch_size, **ARGS, **options)
        results.append(train(model, optimizer, x, y, [4 * batch_size] * 50))
    assert (results[0] - results[1]).abs().max() <= 1e-10


def test_parameters_of_one_age_and_another_past_step_apart():
    """3 + 1 micro-batches weigh more than 1 + 3 now: u differs, and so does w/u."""
    torch.manual_seed(2)
    model = nn.ModuleList([Quartic(), Quartic()])
    attach(model)
    optimizer = MicrobatchAdamW(model.parameters(), **ARGS)
    twins = [Twin(part.p.detach(), batch_size=1, **ARGS) for part in model]
    for used, m in ((0, 3), (0, 1), (1, 2), (1, 2), (None, 2)):
        optimizer.zero_grad()
        x = torch.randn(m, 3, dtype=D)
        parts = [used] if used is not None else [0, 1]
        expected = {i: twins[i].step((model[i].p.detach() - x) ** 3) for i in parts}
        sum(model[i](x).mean() for i in parts).backward()
        optimizer.step()
        for i in parts:
            assert (model[i].p - expected[i]).abs().max() <= 1e-10


def test_max_norm_bounds_the_running_average():
    model, x, y = problem()
    attach(model)
    # eps far above sqrt(s) makes the step lr m~ / eps.
    optimizer = MicrobatchAdamW(model.parameters(), lr=1.0, eps=1e3, weight_decay=0.0, max_norm=1e-3)
    before = vector(model)
    F.cross_entropy(model(x[:1]), y[:1]).backward()
    optimizer.step()
    torch.testing.assert_close((vector(model) - before).norm(), torch.tensor(1e-6, dtype=D), rtol=1e-3, atol=0)
