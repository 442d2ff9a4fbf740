from __future__ import annotations

import pytest
import torch
from torch import nn

from experiments.errors import UserError
from experiments.models import build_model
from experiments.models.dropout import StreamDropout, share_draws
from experiments.schemas.model import ConvnetConfig, MLPConfig, ModelConfig, Normalisation


def test_dropout_masks_belong_to_the_stream_not_to_the_batch() -> None:
    """One batch of 12 and batches of 1, 4 and 7 see the same masks; evaluation draws none."""
    layer, x = StreamDropout(0.5), torch.ones(12, 33)
    torch.manual_seed(0)
    whole = layer(x)
    torch.manual_seed(0)
    parts = torch.cat([layer(rows) for rows in x.split([1, 4, 7])])
    assert torch.equal(whole, parts)
    assert set(whole.unique().tolist()) == {0.0, 2.0}
    state = torch.get_rng_state()
    assert torch.equal(layer.eval()(x), x) and torch.equal(state, torch.get_rng_state())


def test_a_convnet_drops_before_its_last_layer() -> None:
    model = build_model(ConvnetConfig("convnet", [8], 4, dropout=0.5), (1, 8, 8), 10)
    assert [type(layer) for layer in model.children()][-3:] == [nn.Flatten, StreamDropout, nn.Linear]
    without = build_model(ConvnetConfig("convnet", [8], 4), (1, 8, 8), 10)
    assert not any(isinstance(layer, StreamDropout) for layer in without.children())


@pytest.mark.parametrize(
    "config",
    [MLPConfig("mlp", [8], Normalisation.none, dropout=1.0), ConvnetConfig("convnet", [8], 4, dropout=-0.1)],
    ids=["mlp", "convnet"],
)
def test_what_is_no_probability_is_a_user_error(config: ModelConfig) -> None:
    with pytest.raises(UserError, match=r"model.dropout=.* must be at least 0 and less than 1"):
        build_model(config, (1, 8, 8), 10)


def test_processes_draw_the_masks_of_the_whole_batch() -> None:
    """Each has its rows of them, and all have drawn as much."""
    x = torch.ones(12, 33)
    torch.manual_seed(0)
    model = nn.Sequential(StreamDropout(0.5))
    whole, state = model(x), torch.get_rng_state()
    for rows in (slice(0, 5), slice(5, 12)):
        share_draws(model, rows, 12)
        torch.manual_seed(0)
        assert torch.equal(model(x[rows]), whole[rows])
        assert torch.equal(torch.get_rng_state(), state)
