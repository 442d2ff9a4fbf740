"""Engines that see whole backward passes: which of them a parameter's sums are over."""

import pytest
import torch
from torch import nn

from gradstats import attach

EXAMPLES = 4


class Switched(nn.Module):
    """The last layer takes part only when it is on."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.on = nn.Linear(3, 2), nn.Linear(2, 2), False

    def forward(self, x):
        h = self.first(x)
        return self.last(h) if self.on else h


@pytest.mark.parametrize("order", [(False, True), (True, False)])
@pytest.mark.parametrize("engine", ["random_sign", "microbatch"])
def test_a_parameter_that_some_passes_of_a_window_do_not_reach(engine, order):
    model = Switched().double()
    batches = [torch.randn(EXAMPLES, 3).double() for _ in order]
    b = EXAMPLES * len(order)
    contributions, parameters = [], list(model.parameters())
    for model.on, x in zip(order, batches, strict=True):
        for one in model(x).square().mean(1):
            found = torch.autograd.grad(one / b, parameters, allow_unused=True, retain_graph=True)
            contributions.append(
                [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
            )
    stats = attach(model, engine=engine, **({"probes": EXAMPLES} if engine == "random_sign" else {}))
    for model.on, x in zip(order, batches, strict=True):
        if engine == "random_sign":
            stats.backward(model(x).square().mean(1) / len(order))
        else:
            for one in x.split(1):
                (model(one).square().mean() / b).backward()
    for (name, _), c in zip(model.named_parameters(), zip(*contributions, strict=True), strict=True):
        expected = b * torch.stack(c).square().sum(0)
        torch.testing.assert_close(stats.second_moment[name], expected, rtol=1e-10, atol=1e-12)
