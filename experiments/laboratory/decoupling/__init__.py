"""Where the best learning rate lies when another hyperparameter changes: in torch's units, and in units of examples."""

from experiments.laboratory.decoupling.study import STUDY

__all__ = ["STUDY"]
