"""How per-example gradients are formed, by engines that take what `attach` takes and give a Handle."""

from collections.abc import Callable
from functools import partial

from gradstats.engines.fused import FusedHandle
from gradstats.engines.microbatch import MicrobatchHandle
from gradstats.engines.opacus import OpacusHandle
from gradstats.engines.random_sign import RandomSignHandle
from gradstats.handle import Handle

ENGINES: dict[str, Callable[..., Handle]] = {
    "fused": FusedHandle,
    "vmap": partial(FusedHandle, whole=True),
    "opacus": OpacusHandle,
    "microbatch": MicrobatchHandle,
    "random_sign": RandomSignHandle,
}
