from __future__ import annotations

import pytest
import torch

from experiments.errors import UserError
from experiments.models import build_model
from experiments.schemas.model import ConvnetConfig, GPTConfig, MLPConfig, ModelConfig, Normalisation

CASES = {
    "linear": (MLPConfig("mlp", [], Normalisation.none, dropout=0.0), (1, 8, 8), 650),
    "mlp": (MLPConfig("mlp", [16, 4], Normalisation.none, dropout=0.0), (64,), 64 * 16 + 16 + 16 * 4 + 4 + 4 * 10 + 10),
    "normalised": (MLPConfig("mlp", [16], Normalisation.layer, dropout=0.0), (64,), 64 * 16 + 16 + 32 + 170),
    "convnet": (
        ConvnetConfig("convnet", [4, 8], 2),
        (3, 9, 12),
        3 * 4 * 9 + 4 + 8 + 4 * 8 * 9 + 8 + 16 + 8 * 6 * 10 + 10,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_classifies_each_example_by_itself(case: str) -> None:
    config, shape, parameters = CASES[case]
    torch.manual_seed(0)
    model = build_model(config, shape, 10)
    x = torch.randn(5, *shape)
    together, alone = model(x), torch.cat([model(example[None]) for example in x])
    assert together.shape == (5, 10)
    assert torch.allclose(together, alone, atol=1e-5)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize(
    ("config", "shape", "message"),
    [
        (ConvnetConfig("convnet", [4], 2), (64,), r"model=convnet needs images, .* shape \(64,\)"),
        (ConvnetConfig("convnet", [4, 6], 4), (1, 8, 8), "model.groups=4 does not divide 6"),
        (ConvnetConfig("convnet", [4] * 4, 4), (1, 8, 8), "halves the image 4 times, and it has 8 x 8"),
        (MLPConfig("mlp", [8], Normalisation.none, dropout=1.0), (64,), "model.dropout=1.0 must be"),
        (ModelConfig("transformer"), (64,), "model=transformer has no schema_"),
        (GPTConfig("gpt", 8, 1, 2, tied=False, checkpoint=False), (64,), "model=gpt does not read this data"),
    ],
)
def test_refuses_what_it_cannot_build(config: ModelConfig, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_model(config, shape, 10)


def test_text_needs_a_model_of_text() -> None:
    with pytest.raises(UserError, match="model=mlp does not read this data: choose model=gpt for text"):
        build_model(MLPConfig("mlp", [8], Normalisation.none, dropout=0.0), (64,), 10, discrete=True)
