"""The gradient noise scale, how it is estimated, and whether it tells the critical batch size."""

from experiments.laboratory.noise_scale.study import STUDY

__all__ = ["STUDY"]
