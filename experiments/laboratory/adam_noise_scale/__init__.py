"""Whether the optimal learning rate of Adam rises with the batch size, peaks where the noise says, and falls."""

from experiments.laboratory.adam_noise_scale.study import STUDY

__all__ = ["STUDY"]
