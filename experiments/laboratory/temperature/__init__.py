"""The learning rate as a temperature: how far noise keeps from a minimum, annealing, and cycles that explore."""

from experiments.laboratory.temperature.study import STUDY

__all__ = ["STUDY"]
