"""A batch that grows with the measured noise scale, against a learning rate that decays."""

from experiments.laboratory.adaptive_batch.study import STUDY

__all__ = ["STUDY"]
