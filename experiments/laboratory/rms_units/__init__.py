"""RMSProp's step g/sigma, and g/sigma^2, where weights or loss are counted in other units."""

from experiments.laboratory.rms_units.study import STUDY

__all__ = ["STUDY"]
