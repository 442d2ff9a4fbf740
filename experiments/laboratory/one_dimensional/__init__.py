"""Stochastic gradient descent in one dimension: which learning rates converge, and what noise leaves."""

from experiments.laboratory.one_dimensional.study import STUDY

__all__ = ["STUDY"]
