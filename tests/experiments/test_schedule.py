from __future__ import annotations

import numpy as np
import pytest

from experiments.errors import UserError
from experiments.schedule import budget, evaluation_counts, every, learning_rate_schedule, log_spaced
from experiments.schemas.run import Decay

TOTAL = 4096


@pytest.mark.parametrize("decay", Decay)
@pytest.mark.parametrize("warmup", [0, 96, 1024])
def test_integral_is_that_of_the_multiplier(decay: Decay, warmup: int) -> None:
    schedule = learning_rate_schedule(warmup, TOTAL, decay)
    e = (np.arange(TOTAL * 16) + 0.5) / 16  # midpoints
    u = np.clip((e - warmup) / (TOTAL - warmup), 0, 1)
    after = {Decay.none: 1 + 0 * u, Decay.linear: 1 - u, Decay.cosine: (1 + np.cos(np.pi * u)) / 2}[decay]
    multiplier = np.where(e < warmup, e / max(warmup, 1), after)
    for start, stop in [(0, 1), (0, 256), (64, 128), (96, 97), (1000, 1064), (4095, 4096), (0, TOTAL)]:
        assert schedule.mean(start, stop) == pytest.approx(
            multiplier[start * 16 : stop * 16].mean(), rel=1e-5, abs=1e-9
        )


@pytest.mark.parametrize("decay", Decay)
def test_total_over_a_run_does_not_depend_on_the_batch_size(decay: Decay) -> None:
    schedule = learning_rate_schedule(1000, TOTAL, decay)
    totals = [sum(B * schedule.mean(e, e + B) for e in range(0, TOTAL, B)) for B in (1, 4, 16, 256)]
    assert totals == pytest.approx([schedule.integral(0, TOTAL)] * 4, rel=1e-12)


def test_warm_up_ends_within_the_run() -> None:
    with pytest.raises(UserError, match=r"train.warmup_examples=4096 .* less than the run's 4096"):
        learning_rate_schedule(TOTAL, TOTAL, Decay.none)


def test_evaluations_are_log_spaced_multiples_with_both_ends() -> None:
    counts = evaluation_counts(total=34304, multiple=256, count=24)
    assert counts[:3] == [0, 256, 512] and counts[-1] == 34304
    assert all(count % 256 == 0 for count in counts)
    ratios = np.diff(np.log(counts[10:]))
    assert ratios.max() < 1.3 * ratios.min()
    assert log_spaced(256, 16, 5) == [16, 32, 64, 128, 256] and log_spaced(256, 128, 5) == [128, 256]


def test_budget_is_the_largest_multiple_within_the_epochs() -> None:
    assert budget(epochs=24, examples=1437, multiple=256, batch_size=16) == 134 * 256
    with pytest.raises(UserError, match="train.batch_size=48 does not divide evaluation.multiple=256"):
        budget(24, 1437, 256, 48)
    with pytest.raises(UserError, match="train.epochs=0.1 of 1437 examples is less than"):
        budget(0.1, 1437, 256, 16)


def test_intervals_are_rounded_up_to_whole_batches() -> None:
    assert every(100, batch_size=64, total=512) == {128, 256, 384, 512}
    assert every(10**6, batch_size=64, total=512) == {512}
