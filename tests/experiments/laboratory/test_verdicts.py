import pytest

from experiments.estimate import Estimate
from experiments.laboratory.verdicts import both, equals, within

NAN = float("nan")


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.95, 1.05, "holds"),
        (1.15, 1.3, "does not hold"),
        (0.5, 0.85, "does not hold"),
        (0.85, 1.05, "cannot be judged"),
        (0.95, 1.15, "cannot be judged"),
        (NAN, NAN, "cannot be judged"),
    ],
)
def test_the_whole_interval_decides(low: float, high: float, verdict: str) -> None:
    assert equals(Estimate((low + high) / 2, low, high), 0.1) == verdict
    assert within(Estimate((low + high) / 2, low, high), 0.9, 1.1) == verdict


def test_two_claims_hold_where_each_does() -> None:
    assert both("holds", "holds") == "holds"
    assert both("holds", "does not hold") == both("does not hold", "cannot be judged") == "does not hold"
    assert both("cannot be judged", "holds") == both("holds", "cannot be judged") == "cannot be judged"
