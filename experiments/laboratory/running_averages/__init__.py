"""Running averages on noisy data: the wrong start, the noise that is left, and the lag behind a moving signal."""

from experiments.laboratory.running_averages.study import STUDY

__all__ = ["STUDY"]
