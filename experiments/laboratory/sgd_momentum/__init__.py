"""SGD with momentum as a running average in examples, against torch's: on a noisy quadratic, and on the digits."""

from experiments.laboratory.sgd_momentum.study import STUDY

__all__ = ["STUDY"]
