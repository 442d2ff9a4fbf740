"""Prices that some recorded workloads give, held against others."""

from __future__ import annotations

import pytest
from torch._subclasses.fake_tensor import FakeTensorMode

from experiments.errors import UserError
from experiments.planning import overhead
from experiments.planning.overhead import OF_FORM, measured, prices, ratio, traced


@pytest.mark.parametrize("workload", ["gpt", "gpt2_block"])
def test_what_was_recorded_is_what_is_expected(workload: str) -> None:
    """Quartiles of what was recorded are as far apart."""
    assert not any(workload in of for of in OF_FORM.values())
    with FakeTensorMode():
        assert prices().overhead(*traced(workload)) == pytest.approx(ratio(measured(), workload), abs=0.05)


def test_with_a_softmax_over_many_words_it_is_no_less_than_was_recorded() -> None:
    """The softmax's time is no matmul's, and has no part in the estimate."""
    with FakeTensorMode():
        assert prices().overhead(*traced("tied_head")) >= ratio(measured(), "tied_head") - 0.05


@pytest.mark.parametrize("workload", [workload for of in OF_FORM.values() for workload in of])
def test_prices_explain_what_they_come_from(workload: str) -> None:
    with FakeTensorMode():
        assert prices().overhead(*traced(workload)) == pytest.approx(ratio(measured(), workload), abs=0.002)


def test_without_a_record_there_is_no_price(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overhead.record, "records", list)
    with pytest.raises(UserError, match="has no run on a CPU: python -m experiments.benchmark --record"):
        measured()
