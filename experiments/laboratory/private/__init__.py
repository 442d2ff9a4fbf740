"""Private training: DP-SGD and DP-Adam, with norms by gradstats and Opacus' accountant."""

from experiments.laboratory.private.study import STUDY

__all__ = ["STUDY"]
