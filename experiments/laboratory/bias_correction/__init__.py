"""Adam and RMSProp with momentum, with and without the correction of their averages' start from zero."""

from experiments.laboratory.bias_correction.study import STUDY

__all__ = ["STUDY"]
