"""Every layer of torch.nn that owns parameters is exact, or refused with a way out."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import gradstats
from gradstats import CoverageError
from tests import oracle
from tests.layers import B, floats, ids

pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")  # torch's advice on what it speeds up


class Exact(NamedTuple):
    make: Callable[[], nn.Module]
    x: Callable[[], Any]  # a tensor, or positional arguments in a tuple
    served_by: str  # as the coverage table prints it
    example_dim: int = 0


class Refused(NamedTuple):
    make: Callable[[], nn.Module]
    x: Callable[[], Any]
    why: str


class Held(nn.Module):
    """Parameters in a container, which computes nothing itself."""

    def __init__(self, container: nn.Module, key: Any):
        super().__init__()
        self.container, self.key = container, key

    def forward(self, x):
        return x * self.container[self.key]


def several(*arguments: Callable[[], Any]) -> Callable[[], tuple[Any, ...]]:
    return lambda: tuple(argument() for argument in arguments)


SEQUENCE = floats(3, 4)
ENCODER = {"d_model": 4, "nhead": 2, "dim_feedforward": 8, "dropout": 0.0, "batch_first": True}

EXACT = {
    "Linear": Exact(lambda: nn.Linear(4, 3), SEQUENCE, "rule Linear"),
    "Bilinear": Exact(lambda: nn.Bilinear(4, 4, 2), several(SEQUENCE, SEQUENCE), "rule Bilinear"),
    "Embedding": Exact(lambda: nn.Embedding(7, 4), ids(3), "rule Embedding"),
    "EmbeddingBag": Exact(lambda: nn.EmbeddingBag(7, 4), ids(3), "rule EmbeddingBag"),
    "PReLU": Exact(lambda: nn.PReLU(3), SEQUENCE, "rule PReLU"),
    **{
        f"Conv{d}d": Exact(lambda d=d: getattr(nn, f"Conv{d}d")(2, 3, 2), floats(2, *[3] * d), "rule Convolution")
        for d in (1, 2, 3)
    },
    **{
        f"ConvTranspose{d}d": Exact(
            lambda d=d: getattr(nn, f"ConvTranspose{d}d")(2, 3, 2), floats(2, *[3] * d), "rule TransposedConvolution"
        )
        for d in (1, 2, 3)
    },
    "LayerNorm": Exact(lambda: nn.LayerNorm(4), SEQUENCE, "rule LayerNorm"),
    "RMSNorm": Exact(lambda: nn.RMSNorm(4), SEQUENCE, "rule RMSNorm"),
    "GroupNorm": Exact(lambda: nn.GroupNorm(2, 4), floats(4, 3), "rule GroupNorm"),
    **{
        f"InstanceNorm{d}d": Exact(
            lambda d=d: getattr(nn, f"InstanceNorm{d}d")(2, affine=True), floats(2, *[3] * d), "rule InstanceNorm"
        )
        for d in (1, 2, 3)
    },
    **{
        f"BatchNorm{d}d": Exact(
            lambda d=d: getattr(nn, f"BatchNorm{d}d")(2).eval(), floats(2, *[3] * d), "rule BatchNorm"
        )
        for d in (1, 2, 3)
    },
    "SyncBatchNorm": Exact(lambda: nn.SyncBatchNorm(3).eval(), SEQUENCE, "SyncBatchNorm"),
    **{
        name: Exact(lambda name=name: getattr(nn, name)(4, 3, batch_first=True), SEQUENCE, "rule Recurrent")
        for name in ("RNN", "LSTM", "GRU")
    },
    **{
        name: Exact(lambda name=name: getattr(nn, name)(4, 3), floats(4), "rule Cell")
        for name in ("RNNCell", "LSTMCell", "GRUCell")
    },
    "MultiheadAttention": Exact(
        lambda: nn.MultiheadAttention(4, 2, batch_first=True),
        several(SEQUENCE, SEQUENCE, SEQUENCE),
        "vmap over MultiheadAttention",
    ),
    "MultiheadAttention, positions first": Exact(
        lambda: nn.MultiheadAttention(4, 2),
        lambda: tuple(x.transpose(0, 1) for x in several(SEQUENCE, SEQUENCE, SEQUENCE)()),
        "vmap over MultiheadAttention",
        example_dim=1,
    ),
    "TransformerEncoderLayer": Exact(
        lambda: nn.TransformerEncoderLayer(**ENCODER), SEQUENCE, "vmap over MultiheadAttention"
    ),
    "TransformerEncoder": Exact(
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(**ENCODER), 2), SEQUENCE, "rule LayerNorm"
    ),
    "TransformerDecoderLayer": Exact(
        lambda: nn.TransformerDecoderLayer(**ENCODER), several(SEQUENCE, floats(6, 4)), "rule Linear"
    ),
    "TransformerDecoder": Exact(
        lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(**ENCODER), 1),
        several(SEQUENCE, floats(6, 4)),
        "rule Linear",
    ),
    "Transformer": Exact(
        lambda: nn.Transformer(**ENCODER, num_encoder_layers=1, num_decoder_layers=1),
        several(SEQUENCE, floats(6, 4)),
        "rule Linear",
    ),
    "ParameterList": Exact(lambda: Held(nn.ParameterList([torch.randn(4)]), 0), SEQUENCE, "vmap over Held"),
    "ParameterDict": Exact(lambda: Held(nn.ParameterDict({"a": torch.randn(4)}), "a"), SEQUENCE, "vmap over Held"),
    "LinearCrossEntropyLoss": Exact(
        lambda: nn.LinearCrossEntropyLoss(4, 7, reduction="none"),
        several(floats(4), ids()),
        "vmap over LinearCrossEntropyLoss",
    ),
}

REFUSED = {
    **{
        f"BatchNorm{d}d": Refused(
            lambda d=d: getattr(nn, f"BatchNorm{d}d")(2), floats(2, *[3] * d), "Replace it by nn.GroupNorm"
        )
        for d in (1, 2, 3)
    },
    "SyncBatchNorm": Refused(lambda: nn.SyncBatchNorm(3), SEQUENCE, "Replace it by nn.GroupNorm"),
    # Both return a loss over the batch, and the first sends examples to layers by their target.
    "AdaptiveLogSoftmaxWithLoss": Refused(
        lambda: nn.AdaptiveLogSoftmaxWithLoss(4, 8, [2, 4], div_value=2.0),
        lambda: (floats(4)(), torch.tensor([0, 1, 3, 5, 7])),
        "Return losses and other reductions outside",
    ),
    "LinearCrossEntropyLoss": Refused(
        lambda: nn.LinearCrossEntropyLoss(4, 7), several(floats(4), ids()), "Return losses and other reductions outside"
    ),
}

LAZY = {
    "LazyLinear": lambda: nn.LazyLinear(3),
    **{f"LazyConv{d}d": lambda d=d: getattr(nn, f"LazyConv{d}d")(3, 2) for d in (1, 2, 3)},
    **{f"LazyConvTranspose{d}d": lambda d=d: getattr(nn, f"LazyConvTranspose{d}d")(3, 2) for d in (1, 2, 3)},
    **{
        f"LazyInstanceNorm{d}d": lambda d=d: getattr(nn, f"LazyInstanceNorm{d}d")(track_running_stats=False)
        for d in (1, 2, 3)
    },
    **{f"LazyBatchNorm{d}d": lambda d=d: getattr(nn, f"LazyBatchNorm{d}d")().eval() for d in (1, 2, 3)},
}

# Layers that older versions of torch do not have.
for table in (EXACT, REFUSED):
    for name in [name for name in table if name.partition(",")[0] not in vars(nn)]:
        del table[name]

ABSTRACT = {"Module", "RNNBase", "RNNCellBase"}
WRAPPERS = {"DataParallel"}  # owns the parameters of what it wraps


def loss(output: Any, weights: torch.Tensor, example_dim: int = 0) -> torch.Tensor:
    """Of the first tensor in the output."""
    return oracle.coupled_loss(tree_leaves(output)[0].movedim(example_dim, 0).reshape(B, -1), weights)


def attach_and_call(model: nn.Module, x: Any) -> Any:
    gradstats.attach(model)
    return oracle.call(model, x)


def check(model: nn.Module, x: Any, served_by: str, example_dim: int) -> None:
    model, x, weights = model.double(), oracle.to_double(x), torch.rand(B, dtype=torch.float64)
    cut = [0] if isinstance(oracle.call(model, x), tuple) else []
    expected = oracle.contributions(
        model, lambda output, weights: loss(output, weights, example_dim), x, weights, cut, example_dim
    )
    handle = gradstats.attach(model, *oracle.STATISTICS, example_dims=example_dim)
    loss(oracle.call(model, x), weights, example_dim).backward()
    assert oracle.exact(handle, expected)
    assert served_by in handle.coverage()


@pytest.mark.parametrize("name", EXACT)
def test_exact(name):
    row = EXACT[name]
    check(row.make(), row.x(), row.served_by, row.example_dim)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    row = REFUSED[name]
    with pytest.raises(CoverageError, match=row.why):
        attach_and_call(row.make(), row.x())


@pytest.mark.parametrize("name", LAZY)
def test_lazy_layers_are_refused_until_their_first_call(name):
    row = EXACT[name.removeprefix("Lazy")]
    model, x = LAZY[name](), row.x()
    with pytest.raises(CoverageError, match="call the model once before attach"):
        gradstats.attach(model)
    model(x)
    check(model, x, row.served_by, row.example_dim)


def without_parameters(kind: type[nn.Module]) -> bool:
    """Whether the layer can be built, and owns nothing."""
    for arguments in ((), (2,), (2, 2), (1, (1, 1))):
        try:
            return not any(True for _ in kind(*arguments).parameters())
        except (TypeError, ValueError, AttributeError):
            continue
    return False


@pytest.mark.filterwarnings("ignore::FutureWarning")  # deprecated layers
def test_no_layer_of_torch_is_missing():
    layers = {name for name, kind in vars(nn).items() if inspect.isclass(kind) and issubclass(kind, nn.Module)}
    listed = {*EXACT, *REFUSED, *LAZY, *ABSTRACT, *WRAPPERS}
    assert {name for name in layers - listed if not without_parameters(getattr(nn, name))} == set()
