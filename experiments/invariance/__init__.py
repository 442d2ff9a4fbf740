"""Batch-size invariance of methods, from the records of their runs: scores, regrets, tables, figure, findings."""
