"""From full-batch descent to Adam: ours on torch's curves, and fewer steps at similar time with each method."""

from experiments.laboratory.adam_and_friends.study import STUDY

__all__ = ["STUDY"]
