"""Optimizers whose hyper-parameters do not depend on the batch size. One file each."""

from gradstats.optim.adam import BatchInvariantAdam

__all__ = ["BatchInvariantAdam"]
