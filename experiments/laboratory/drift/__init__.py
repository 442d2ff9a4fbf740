"""How fast the true gradient changes along training, against the noise of its estimates: which average is best?"""

from experiments.laboratory.drift.study import STUDY

__all__ = ["STUDY"]
