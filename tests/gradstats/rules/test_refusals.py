"""What rules refuse: settings of a layer at attach, calls when they are made, each with a way out."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.nn.utils import prune, weight_norm

import gradstats
from gradstats import CoverageError
from tests.layers import floats, ids


class Refused(NamedTuple):
    make: Callable[[], nn.Module]
    why: str
    way_out: str


SETTINGS = {
    "embedding, sparse": Refused(lambda: nn.Embedding(7, 4, sparse=True), "sparse gradients", "sparse=False"),
    "embedding, max_norm": Refused(
        lambda: nn.Embedding(7, 4, max_norm=1.0), "max_norm rewrites the table", "after the step"
    ),
    "embedding bag, sparse": Refused(
        lambda: nn.EmbeddingBag(7, 4, mode="sum", sparse=True), "sparse gradients", "sparse=False"
    ),
    "embedding bag, max_norm": Refused(
        lambda: nn.EmbeddingBag(7, 4, max_norm=1.0), "max_norm rewrites the table", "after the step"
    ),
    "embedding bag, frequencies": Refused(
        lambda: nn.EmbeddingBag(7, 4, scale_grad_by_freq=True), "other rows' frequencies", "scale_grad_by_freq=False"
    ),
    "instance norm, running statistics": Refused(
        lambda: nn.InstanceNorm2d(3, affine=True, track_running_stats=True),
        "mix examples over time",
        "track_running_stats=False",
    ),
    "batch norm in training": Refused(lambda: nn.BatchNorm2d(3), "depend on the others", "nn.GroupNorm"),
    "batch norm without running statistics": Refused(
        lambda: nn.BatchNorm2d(3, track_running_stats=False).eval(), "depend on the others", "nn.GroupNorm"
    ),
    "weight norm by hook": Refused(
        lambda: weight_norm(nn.ConvTranspose2d(3, 4, 2)), "computes its parameters", "torch.nn.utils.parametrizations"
    ),
    "pruned": Refused(
        lambda: prune.l1_unstructured(nn.Bilinear(3, 4, 2), "weight", 0.5),
        "computes its parameters",
        "torch.nn.utils.parametrizations",
    ),
    "scripted": Refused(
        lambda: nn.Sequential(torch.jit.script(nn.Linear(3, 2))), "no Python that could be attached", "torch.compile"
    ),
    "complex": Refused(lambda: nn.ConvTranspose1d(2, 2, 2, dtype=torch.complex64), "is complex", "real parameters"),
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated", "ignore:`torch.jit")
@pytest.mark.parametrize("name", SETTINGS)
def test_settings(name):
    row = SETTINGS[name]
    with pytest.raises(CoverageError, match=row.why) as refusal:
        gradstats.attach(row.make())
    assert row.way_out in str(refusal.value)


class Unbatched(NamedTuple):
    make: Callable[[], nn.Module]
    x: Callable[[], Any]  # of several examples


UNBATCHED = {
    "linear": Unbatched(lambda: nn.Linear(4, 3), floats(4)),
    "bilinear": Unbatched(lambda: nn.Bilinear(4, 3, 2), lambda: (floats(4)(), floats(3)())),
    "conv": Unbatched(lambda: nn.Conv2d(3, 2, 1), floats(3, 4, 4)),
    "transposed conv": Unbatched(lambda: nn.ConvTranspose2d(3, 2, 1), floats(3, 4, 4)),
    "prelu": Unbatched(lambda: nn.PReLU(3), floats(3)),
    "embedding bag without offsets": Unbatched(lambda: nn.EmbeddingBag(7, 4, mode="sum"), ids(3)),
    "layer norm": Unbatched(lambda: nn.LayerNorm(4), floats(4)),
}


@pytest.mark.parametrize("name", UNBATCHED)
def test_one_example_without_its_dimension(name):
    row = UNBATCHED[name]
    model, x = row.make(), row.x()
    gradstats.attach(model)
    with pytest.raises(CoverageError, match=r"takes batched tensors while attached.*Use x.unsqueeze\(0\)"):
        model(*(v[0] for v in x)) if isinstance(x, tuple) else model(x[0])
