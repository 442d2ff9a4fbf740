"""Gradients of examples against each other along training, and wrong labels found by how long they are."""

from experiments.laboratory.gradient_diversity.study import STUDY

__all__ = ["STUDY"]
