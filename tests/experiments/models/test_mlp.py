from __future__ import annotations

from torch import nn

from experiments.models import build_model
from experiments.models.dropout import StreamDropout
from experiments.schemas.model import MLPConfig, Normalisation


def test_normalisation_precedes_every_activation_and_dropout_follows_it() -> None:
    model = build_model(MLPConfig("mlp", [8, 8], Normalisation.layer, dropout=0.5), (4,), 2)
    kinds = [type(layer) for layer in model.children()]
    assert kinds == [nn.Flatten, *[nn.Linear, nn.LayerNorm, nn.ReLU, StreamDropout] * 2, nn.Linear]
