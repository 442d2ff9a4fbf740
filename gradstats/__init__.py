"""Distribution of the per-example gradients behind every batch gradient, exactly, in the same backward pass.

Three ideas: an example's *contribution* c_b = dL/dtheta_b, where sum_b c_b = p.grad; the *shadow leaf*, whose gradient
is a statistic of the contributions; the *horizon in examples*, in which optimizers count time.
"""

from gradstats.attach import attach, attached
from gradstats.compute import Result, compute
from gradstats.errors import CoverageError, GradstatsError, LifetimeError, MissingStatistic, VerificationError
from gradstats.handle import Handle
from gradstats.noise_scale import NoiseScale
from gradstats.per_example import per_example_gradients
from gradstats.projection import Projection
from gradstats.verify import Verification, verify
from gradstats.window import BlockStatistic

__version__ = "0.1.0"

__all__ = [
    "BlockStatistic",
    "CoverageError",
    "GradstatsError",
    "Handle",
    "LifetimeError",
    "MissingStatistic",
    "NoiseScale",
    "Projection",
    "Result",
    "Verification",
    "VerificationError",
    "attach",
    "attached",
    "compute",
    "per_example_gradients",
    "verify",
]
