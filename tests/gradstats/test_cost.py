"""What a step with statistics costs, counted rather than timed."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from experiments.gpt import GPT
from gradstats import attach
from gradstats.compute import call
from tests.layers import LAYERS, Row

GPTS = {
    f"gpt, {name}": Row(lambda tied=tied: GPT(50, 16, 2, 2, 8, tied=tied), lambda: torch.randint(0, 50, (5, 8)))
    for name, tied in (("tied", True), ("untied", False))
}


class Waits(TorchDispatchMode):
    """Counts operations whose result, or its size, the host must wait for on an accelerator."""

    WAITING = frozenset(
        {"_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "unique_consecutive", "_unique2"}
    )

    def __init__(self):
        super().__init__()
        self.counted = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        by_mask = name in ("index", "index_put_") and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in self.WAITING or by_mask:
            self.counted[name] += 1
        return func(*args, **(kwargs or {}))


def waits(model, x):
    with Waits() as mode:
        output = call(model, x)
        (output[0] if isinstance(output, tuple) else output).square().mean().backward()
    model.zero_grad()
    return mode.counted


# torch's own EmbeddingBag takes offsets from the device; ours pads the bags, which needs their sizes.
PADDED = {name for name in LAYERS if "offsets" in name}


@pytest.mark.parametrize("statistic", ["second_moment", "norms", "variance"])
@pytest.mark.parametrize("name", sorted((LAYERS | GPTS).keys() - PADDED))
def test_no_host_synchronisation(name, statistic):
    row = (LAYERS | GPTS)[name]
    model, x = row.make(), row.x()
    plain = waits(model, x)
    stats = attach(model, statistic)
    for _ in range(2):  # both probe
        waits(model, x)
    assert stats.batch_size and waits(model, x) == plain
