from __future__ import annotations

from math import log

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from experiments.errors import UserError
from experiments.models import build_model
from experiments.schemas.model import GPTConfig

TIED = GPTConfig("gpt", 32, 8, 4, tied=True, checkpoint=False)


@pytest.mark.parametrize("tied", [False, True])
def test_its_loss_begins_at_the_logarithm_of_the_number_of_words(tied: bool) -> None:
    torch.manual_seed(0)
    model = build_model(GPTConfig("gpt", 32, 2, 4, tied, checkpoint=False), (16,), 50, discrete=True)
    logits = model(torch.randint(50, (8, 16)))
    assert logits.shape == (8, 16, 50)
    assert F.cross_entropy(logits.flatten(0, -2), torch.randint(50, (128,))).item() == pytest.approx(log(50), abs=0.05)


def test_weights_begin_as_those_of_gpt2() -> None:
    torch.manual_seed(0)
    model = build_model(TIED, (16,), 50, discrete=True)
    deviations = {name: p.std().item() for name, p in model.named_parameters() if p.ndim == 2 and "norm" not in name}
    residual = {name for name in deviations if name.endswith(("projection.weight", "mlp.2.weight"))}
    assert len(residual) == 16
    for name, deviation in deviations.items():
        assert deviation == pytest.approx(0.02 / (4 if name in residual else 1), rel=0.1), name
    biases = [m.bias for m in model.modules() if isinstance(m, nn.Linear) and m.bias is not None]
    assert len(biases) == 4 * 8 and not any(bias.any() for bias in biases)  # a tied head has none


def test_heads_divide_the_width() -> None:
    with pytest.raises(UserError, match="model.heads=5 does not divide model.width=32"):
        build_model(GPTConfig("gpt", 32, 2, 5, tied=False, checkpoint=False), (16,), 50, discrete=True)
