"""What a run says to the bars."""

from __future__ import annotations

from typing import Any

import pytest

from experiments.benchmarks.bars import BARS, CPU, Judged, What, judged
from experiments.benchmarks.results import Row
from tests.experiments.benchmarks.synthetic import ABOUT, made, run

ON_H200 = {**ABOUT, "device": "cuda:1", "dtype": "bfloat16", "processor": "NVIDIA H200"}
OURS = "ours-second_moment"


def of(
    rows: list[Row], contestant: str = OURS, what: What = "time", workload: str = "mlp", about: Any = ABOUT
) -> list[Judged]:
    wanted = workload, contestant, what
    return [one for one in judged(rows, about) if (one.workload, one.contestant, one.what) == wanted]


@pytest.mark.parametrize(
    ("ratio", "expected"), [(1.4, "holds"), (1.45, "cannot be judged"), (1.55, "cannot be judged")]
)
def test_a_time_is_judged_where_its_quartiles_are_on_one_side(ratio: float, expected: str) -> None:
    """They are 0.1 away."""
    (one,) = of([made(OURS, ratio)])
    assert one.verdict == expected and one.limit == (1.5, 1.5, 1.5)
    assert one.measured == pytest.approx((ratio - 0.1, ratio, ratio + 0.1))


def test_a_time_above_the_limit_does_not_hold() -> None:
    (one,) = of([made(OURS, 1.61)])
    assert one.verdict == "does not hold"


@pytest.mark.parametrize(
    ("workload", "contestant", "above", "expected"),
    [
        ("mlp", OURS, 1.004, "holds"),
        ("mlp", OURS, 1.006, "does not hold"),
        ("gpt", OURS, 1.10, "holds"),
        ("gpt", OURS, 1.11, "does not hold"),
        ("gpt", "ours-norms", 0.05, "holds"),
        ("gpt", "ours-norms", 0.06, "does not hold"),
    ],
)
def test_memory_is_in_buffers_of_the_size_of_the_parameters(
    workload: str, contestant: str, above: float, expected: str
) -> None:
    rows = [made(contestant, 1.0, workload=workload, above=above)]
    (one,) = of(rows, contestant, "memory", workload)
    assert one.verdict == expected


def test_what_is_not_there_has_a_reason() -> None:
    rows = [made(OURS, error="takes more than 9 s"), made(OURS, workload="gpt")]
    reasons = {workload: of(rows, workload=workload)[0].verdict for workload in ("mlp", "gpt", "resnet18")}
    assert reasons == {
        "mlp": "not measured: takes more than 9 s",
        "gpt": "not measured: no time",
        "resnet18": "not measured: not in this run",
    }
    assert of(rows, what="memory", workload="gpt")[0].verdict == "not measured: no memory"


def test_bars_ask_for_their_machine() -> None:
    rows = [made(OURS, 1.0, workload=workload, above=0.5) for workload in ("mlp", "gpt2_small")]
    for what in ("time", "memory"):
        for about, here, elsewhere in ((ABOUT, "mlp", "gpt2_small"), (ON_H200, "gpt2_small", "mlp")):
            (held,) = of(rows, what=what, workload=here, about=about)
            (lacks,) = of(rows, what=what, workload=elsewhere, about=about)
            assert held.verdict == "holds" and lacks.verdict.startswith("not measured: asks for device c")
    (one,) = of(rows, about={**ABOUT, "threads": 12})
    assert one.verdict == "not measured: asks for threads 2"


@pytest.mark.parametrize("r", [1.4, 2.2])
def test_the_limit_of_sampled_steps_follows_the_exact_ones_of_the_run(r: float) -> None:
    limit = 1 + (r - 1) / 8 + 0.02
    verdicts = []
    for ratio in (limit - 0.02, limit, limit + 0.02):
        sampled = made("ours-every", ratio, lower=ratio - 0.001, upper=ratio + 0.001)
        (one,) = of([made(OURS, r), sampled], "ours-every")
        assert one.limit == pytest.approx((limit - 0.1 / 8, limit, limit + 0.1 / 8))
        verdicts.append(one.verdict)
    assert verdicts == ["holds", "cannot be judged", "does not hold"]


def test_sampled_steps_have_the_memory_of_exact_ones() -> None:
    exact = {(bar.workload, bar.memory) for bar in BARS if bar.contestant == OURS and bar.on == CPU}
    rows = [made("ours-every", 1.0, workload=workload) for workload in ("gpt2_block", "vit")]
    found = [one for one in judged(rows, ABOUT) if (one.contestant, one.what) == ("ours-every", "memory")]
    assert {(one.workload, one.limit[0]) for one in found} == exact  # vit, without a bar of its own, has none
    (one,) = of(rows, "ours-every", workload="vit")
    assert one.verdict == "not measured: not in this run"  # the exact one


def test_peers_are_the_best_of_those_that_are_right() -> None:
    """Neither the wrong one, which is the fastest, nor an estimate, nor one of another statistic."""
    _, time = of(run().rows)
    assert (time.rival, time.limit) == ("torch.func, all at once", pytest.approx((9.4, 9.5, 9.6)))
    assert time.verdict == "holds"


@pytest.mark.parametrize(("ratio", "expected"), [(1.2, "holds"), (1.35, "cannot be judged"), (1.7, "does not hold")])
def test_peers_are_beaten_where_the_quartiles_of_both_are_apart(ratio: float, expected: str) -> None:
    rows = [made("ours-norms", ratio), made("opacus-norms", 9.0, above=0.1), made("opacus-ghost", 1.45)]
    (one,) = of(rows, "ours-norms")
    assert (one.rival, one.verdict) == ("Opacus, ghost clipping", expected)


@pytest.mark.parametrize(("above", "expected"), [(0.9, "holds"), (1.0, "cannot be judged"), (1.01, "does not hold")])
def test_the_leanest_peer_has_to_be_beaten_too(above: float, expected: str) -> None:
    rows = [made("ours-norms", 1.0, above=above), made("opacus-norms", 9.0, above=1.001), made("opacus-ghost", 1.45)]
    (one,) = of(rows, "ours-norms", "memory")
    assert (one.rival, one.verdict) == ("Opacus, hooks", expected)


def test_without_a_peer_that_is_right_its_failure_is_told() -> None:
    (one,) = of(run().rows, "ours-norms")
    assert one.verdict == "not measured: Opacus, ghost clipping: not installed" and not one.rival
    assert not of(run().rows, "ours-variance")


def test_micro_batches_of_one_are_held_to_a_loop() -> None:
    rows = [made("ours-single", 1.2, above=-4.0), made("loop", 1.6, above=-3.0), made("func-whole", 1.0)]
    time, memory = of(rows, "ours-single") + of(rows, "ours-single", "memory")
    assert (time.rival, time.verdict) == ("a loop over examples", "holds")
    assert (memory.limit[0], memory.verdict) == (-3.0, "holds")
    (missing,) = of(rows[1:], "ours-single")
    assert missing.verdict == "not measured: not in this run"
