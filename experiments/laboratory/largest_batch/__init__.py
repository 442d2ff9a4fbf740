"""What ends invariance to the batch size near the tuned learning rate, and whether that can be pushed."""

from experiments.laboratory.largest_batch.study import STUDY

__all__ = ["STUDY"]
