"""BatchInvariantLion: Algorithm 2 at the tuned batch size, its equations elsewhere."""

import pytest
import torch

from gradstats.optim import BatchInvariantLion
from tests.gradstats.optim.quartic import Quartic, compare


class Twin:
    """The docstring, line by line."""

    def __init__(self, p, lr, betas, weight_decay, batch_size, average="ewma"):
        self.p, self.lr, self.betas, self.decay, self.b0 = p.clone(), lr, betas, weight_decay, batch_size
        self.average, self.e, self.m = average, 0, torch.zeros_like(p)

    def step(self, g):
        b, m = len(g), g.mean(0)
        self.e += b
        rho1, rho2 = (beta ** (1 / self.b0) for beta in self.betas)
        c = rho1**b * self.m + (1 - rho1**b) * m
        self.p = self.p * (1 - self.lr * self.decay) ** (b / self.b0) - b / self.b0 * self.lr * c.sign()
        w = 1 - rho2**b
        if self.average == "debiased_ewma":
            w /= 1 - rho2**self.e
        self.m = (1 - w) * self.m + w * m
        return self.p


@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.99, 0.5), (0.9, 0.0)])
@pytest.mark.parametrize("average", ["ewma", "debiased_ewma"])
def test_follows_its_equations(betas, average):
    args = {"lr": 0.02, "betas": betas, "weight_decay": 0.1, "batch_size": 8, "average": average}
    compare(lambda ps: BatchInvariantLion(ps, **args), lambda p: Twin(p, **args))


def test_is_lion_at_the_tuned_batch_size():
    model = Quartic()
    optimizer = BatchInvariantLion(model.parameters(), lr=0.01, betas=(0.9, 0.99), weight_decay=0.1, batch_size=4)
    p, m = model.p.detach().clone(), torch.zeros(3, dtype=torch.float64)
    for _ in range(100):
        x = torch.randn(4, 3, dtype=torch.float64)
        g = ((p - x) ** 3).mean(0)
        p, m = p - 0.01 * ((0.9 * m + 0.1 * g).sign() + 0.1 * p), 0.99 * m + 0.01 * g
        optimizer.zero_grad()
        model(x).mean().backward()
        optimizer.step(batch_size=4)
        assert (model.p - p).abs().max() <= 1e-10
