"""The sign of a gradient before the mean over a batch, after it, and after the running average."""

from experiments.laboratory.sign_placement.study import STUDY

__all__ = ["STUDY"]
