"""How per-example gradients are formed, behind one interface: engine(model, statistics, loss_reduction) -> Handle."""

from collections.abc import Callable
from functools import partial

from gradstats.engines.fused import FusedHandle
from gradstats.engines.microbatch import MicrobatchHandle
from gradstats.engines.opacus import OpacusHandle
from gradstats.handle import Handle

ENGINES: dict[str, Callable[..., Handle]] = {
    "fused": FusedHandle,
    "vmap": partial(FusedHandle, whole=True),
    "opacus": OpacusHandle,
    "microbatch": MicrobatchHandle,
}
