from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiments.config import compose_config
from experiments.errors import UserError
from experiments.jobs import Job, Measurement, Result
from experiments.laboratory.adaptive_batch import runs
from experiments.laboratory.adaptive_batch.analysis import GROWING, Tuned, at_equal, octave_of
from experiments.laboratory.adaptive_batch.contenders import KEPT, STEP, Contender, contenders, fixed
from experiments.laboratory.adaptive_batch.runs import next_size, stepping, take_turns, trained
from experiments.laboratory.adaptive_batch.study import AdaptiveBatch
from experiments.laboratory.along import along
from experiments.laboratory.problem import problem_of
from experiments.laboratory.schemas import AdaptiveBatchConfig
from experiments.launch import run_study
from experiments.report import Summary
from experiments.schemas.run import Config, Decay
from experiments.study import Outcome, default_optimizer
from experiments.themes import DARK, LIGHT, image

pytestmark = pytest.mark.usefixtures("few_resamples")

SETTINGS = AdaptiveBatchConfig(
    name="adaptive_batch",
    seeds=[0, 1, 2],
    workers=1,
    method="batch_invariant_adam",
    batch_sizes=[16, 64],
    smallest=4,
    largest=128,
    horizon=1280,
    octaves=[-1, 0, 1],
    points=4,
)
METHOD = {"method": "batch_invariant_adam", "horizon": 1280, "seed": 0}


@pytest.fixture
def config() -> Config:
    overrides = ["tracker=none", "train.epochs=0.5", "train.warmup_examples=64", "model.widths=[8]"]
    return dataclasses.replace(compose_config(overrides), name="adaptive_batch", directory="nowhere", study=SETTINGS)


def label_of(coordinates: Mapping[str, Any]) -> str:
    names = [field.name for field in dataclasses.fields(Contender)]
    wanted = Contender(
        **{name: coordinates[name] for name in names if name != "decay"}, decay=Decay(coordinates["decay"])
    )
    (found,) = (label for label, contender in contenders(SETTINGS).items() if contender == wanted)
    return found


def found(job: Job, loss: Mapping[str, float], seconds: Mapping[str, float], noise: float, limited: float) -> Any:
    """Losses are lowest at the octave 0; a decay tuned over other examples has `limited` of its loss."""
    c: Any = job.coordinates
    jitter = math.exp(1e-3 * c["seed"])
    if "contenders" in c:
        labels = json.loads(c["contenders"])
        sizes = [8, 32, 64, 128]
        return {
            "examples": [128, 256, 512, 640],
            "contenders": {
                label: {
                    "train": [1.0, 0.5, 0.2, loss.get(label, 0.1) * jitter],
                    "test": [1.0, 0.5, 0.3, 2 * loss.get(label, 0.1) * jitter],
                    "steps": [1, 2, 3, 10 if label in GROWING else 40],
                    "seconds": [1, 2, 3, seconds.get(label, 4.0)],
                    "size": sizes if label in GROWING else [16] * 4,
                    "noise": [B * noise for B in sizes] if label in GROWING else [None] * 4,
                }
                for label in labels
            },
        }
    label = label_of(c)
    off = math.log2(c["lr"] / default_optimizer(SETTINGS.method).lr)
    factor = 1.0 if c["examples"] == 640 else limited
    value = loss.get(label, 0.1) * factor * jitter * math.exp(0.2 * off**2)
    return {"train": value, "test": 2 * value, "steps": 40}


def planned(config: Config, study: AdaptiveBatch, *given: Any) -> list[Result]:
    known: list[Result] = []
    for _ in range(4):
        jobs = study.jobs(config, known)
        known = [Result(job.coordinates, found(job, *given), 1.0) for job in jobs]
    return known


def outcome(
    config: Config,
    loss: Mapping[str, float] | None = None,
    seconds: Mapping[str, float] | None = None,
    noise: float = 2.0,
    limited: float = 2.0,
) -> Outcome:
    study = AdaptiveBatch(SETTINGS)
    return study.outcome(planned(config, study, loss or {}, seconds or {}, noise, limited))


FASTER = {KEPT: 1.0, STEP: 1.0}


def test_findings_come_out_both_ways(config: Config):
    good = outcome(config, seconds=FASTER)
    judged = [finding for finding in good.findings if finding.verdict]
    assert len(judged) == 17 and {finding.verdict for finding in judged} == {"holds"}
    assert len({image(good.draw(theme), "png") for theme in (LIGHT, DARK)}) == 2
    slow = {label: 0.3 for label in GROWING}
    bad = outcome(config, loss=slow, seconds=FASTER, noise=100.0)
    verdicts = [finding.verdict for finding in bad.findings if finding.verdict]
    # The steps are fewer whatever the loss.
    assert verdicts == ["does not hold"] * 5 + ["holds"] * 2 + ["does not hold"] * 8 + ["holds"] * 2
    told = [finding.sentence for finding in bad.findings]
    assert (
        "The training loss is 3.00 [3.00, 3.00] times" in told[0] and "0.250 [0.250, 0.250] times the steps" in told[0]
    )
    assert "Its loss is 1.50" in told[7]


def test_batches_far_from_the_noise_scale(config: Config):
    far = outcome(config, noise=0.1)
    assert [finding.verdict for finding in far.findings if "follows" in finding.bar] == ["does not hold"] * 2


def test_a_noise_scale_without_a_signal_is_beyond_the_largest_batch(config: Config):
    told = [finding for finding in outcome(config, noise=math.nan).findings if "follows" in finding.bar]
    # Sizes of 64 and 128, of which the latter is the largest.
    assert [finding.verdict for finding in told] == ["holds"] * 2 and "B is 0.707" in told[0].sentence


def test_tuning_is_repeated_in_every_resample():
    log_loss = np.array([[0.0, 3.0], [2.0, 0.0]])
    tuned = Tuned(640, np.array([1.0, 2.0]), log_loss, log_loss + 1)
    assert tuned.lr == 1.0 and tuned.at_edge
    assert tuned.log_loss(np.array([1, 1])) == 0 and tuned.log_loss(np.array([0, 1]), held_out=True) == 2


def test_an_interval_has_the_uncertainty_of_what_examples_cost(config: Config):
    """A decay whose loss is halved by half the examples, at a share that every seed measures differently."""
    study = AdaptiveBatch(SETTINGS)
    known = planned(config, study, {}, {KEPT: 1.0, STEP: 1.0}, 2.0, 0.5)
    exact = study.analysed(known)
    for result in known:
        if "contenders" in result.coordinates:
            paid = result.found["contenders"][KEPT]["seconds"]
            paid[-1] *= 1.2 ** (int(result.coordinates["seed"] or 0) - 1)
    found, rival = study.analysed(known), fixed(Decay.linear, 16)
    share, ratio = found.share("seconds", KEPT, rival), found.ratio_at_equal("seconds", KEPT, rival)
    assert share.value == pytest.approx(0.25) and share.low < 0.25 / 1.1 and share.high > 0.25 * 1.1
    # From 128 of 640 examples to all of them the loss doubles: by a power of ln 2 / ln 5 of the examples.
    slope = math.log(2) / math.log(5)
    assert ratio.value == pytest.approx(exact.ratio_at_equal("seconds", KEPT, rival).value)
    for end, other in ((ratio.low, share.high), (ratio.high, share.low)):
        assert end / ratio.value == pytest.approx((other / share.value) ** -slope, rel=0.01)
    held_out = found.ratio_at_equal("seconds", KEPT, rival, held_out=True)
    assert held_out.high - held_out.low > 0.1
    # Steps were the same in every seed.
    steps = found.ratio_at_equal("steps", KEPT, rival)
    assert steps.high / steps.low < 1.01


def test_seconds_are_of_processor_time(monkeypatch: pytest.MonkeyPatch):
    """What waits for another program takes none."""
    problem = problem_of(compose_config(["model.widths=[8]"]))
    waited, computes = 0.0, runs.backward

    def backward(*given: Any) -> None:
        nonlocal waited
        time.sleep(0.05)
        waited += 0.05
        computes(*given)

    monkeypatch.setattr(runs, "backward", backward)
    (now,) = stepping(problem, "batch_invariant_adam", Contender(16, 16), 8e-3, 1280, 0, 0, [128])
    assert 0 < now.seconds < waited


def test_rivals_are_tuned_for_the_seconds_and_the_steps_of_the_growing_batch(config: Config):
    study = AdaptiveBatch(SETTINGS)
    known = planned(config, study, {}, {KEPT: 1.0, STEP: 2.0}, 2.0, 2.0)
    races = [result for result in known if "contenders" in result.coordinates]
    assert len(races) == 3
    limits = at_equal(SETTINGS, races, 64)
    # A quarter of the seconds, 160 of 640 examples, is a batch of 128; half of them are 320, which rounds to two.
    assert limits["seconds", KEPT, fixed(Decay.linear, 16)] == 128
    assert limits["seconds", STEP, fixed(Decay.cosine, 64)] == 256
    assert limits["steps", STEP, fixed(Decay.cosine, 64)] == 128
    limited = {r.coordinates["examples"] for r in known if "decay" in r.coordinates} - {640}
    assert limited == {128, 256}
    assert at_equal(SETTINGS, races, 200)["seconds", KEPT, fixed(Decay.linear, 16)] == 512


def test_every_contender_is_tuned_alike(config: Config):
    study = AdaptiveBatch(SETTINGS)
    first = study.jobs(config, [])
    assert len(first) == 8 * 3 * 3 and all(isinstance(job, Measurement) for job in first)
    # The best of one lies at an end: it gets another octave before anything is raced.
    known = [Result(job.coordinates, found(job, {}, {}, 2.0, 2.0), 1.0) for job in first]
    for result in known:
        if label_of(result.coordinates) == KEPT:
            result.found["train"] = 1 / float(result.coordinates["lr"] or 1)
    more = study.jobs(config, known)
    new = [job for job in more if job.directory not in {j.directory for j in first}]
    assert {label_of(job.coordinates) for job in new} == {KEPT} and len(new) == 3
    base = default_optimizer(SETTINGS.method).lr
    assert {octave_of(Result(job.coordinates, {}, 1.0), base) for job in new} == {2.0}


def test_batches_are_powers_of_two_and_meet_every_multiple():
    assert [next_size(8, position) for position in (0, 4, 8, 12)] == [8, 4, 8, 4]
    position, sizes = 0, []
    for size in [4] * 3 + [64] * 8:
        sizes.append(next_size(size, position))
        position += sizes[-1]
    assert sizes == [4, 4, 4, 4, 16, 32, 64, 64, 64, 64, 64]


def test_a_fixed_size_is_the_run_of_along():
    problem = problem_of(compose_config(["model.widths=[8]"]))
    own = list(stepping(problem, "batch_invariant_adam", Contender(16, 16), 8e-3, 1280, 64, 0, [128, 256]))
    method = dataclasses.replace(default_optimizer("batch_invariant_adam"), lr=8e-3)
    *_, (_, _, expected, _) = along(problem, method, 16, 64, 0, [128, 256])
    for a, b in zip(own[-1].model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert own[-1].steps == 16


def test_a_race_is_the_runs_alone():
    """Whatever took turns with them, masks of dropout included; and batches grow."""
    problem = problem_of(compose_config(["model.widths=[8]"]))
    rows = {
        label: {"contender": dataclasses.asdict(Contender(*given)), "lr": 8e-3}
        for label, given in {"fixed": (16, 16, Decay.linear), "growing": (2, 32, Decay.none, True)}.items()
    }
    made = take_turns(problem, contenders=json.dumps(rows), warmup=64, examples=1024, multiple=128, points=3, **METHOD)  # type: ignore[arg-type]
    assert made["examples"] == [128, 384, 1024]
    for label, row in rows.items():
        contender: Any = row["contender"]
        alone = trained(problem, lr=8e-3, warmup=64, examples=1024, **contender, **METHOD)
        one = made["contenders"][label]
        assert [one[key][-1] for key in ("train", "test", "steps")] == [
            alone[key] for key in ("train", "test", "steps")
        ]
        assert one["seconds"] == sorted(one["seconds"]) and one["seconds"][0] > 0
    growing = made["contenders"]["growing"]
    assert growing["size"] == sorted(growing["size"]) and growing["size"][-1] > 2
    assert growing["noise"][0] > 0 and made["contenders"]["fixed"]["noise"] == [None] * 3


def test_a_constant_step_divides_the_rate_by_the_growth(monkeypatch: pytest.MonkeyPatch):
    """Two steps of B = 8, of which the second half as long an example's: with a size that jumps at once."""
    monkeypatch.setattr("gradstats.optim.AdaptiveBatchSize.update", lambda self, stats: setattr(self, "size", 8))
    problem = problem_of(compose_config(["model.widths=[8]", "model.dropout=0"]))
    runs = {}
    for constant in (True, False):
        contender = Contender(4, 8, constant_step=constant)
        last = list(stepping(problem, "batch_invariant_adam", contender, 1e-4, 1280, 0, 0, [8, 16]))[-1]
        runs[constant] = torch.cat([p.detach().flatten() for p in last.model.parameters()])
        assert last.steps == 3
    same = list(stepping(problem, "batch_invariant_adam", Contender(4, 8), 1e-4, 1280, 0, 0, [8]))[-1]
    before = torch.cat([p.detach().flatten() for p in same.model.parameters()])
    torch.testing.assert_close(runs[True] - before, (runs[False] - before) / 2, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_sizes": [12]}, "powers of two"),
        ({"smallest": 128}, "above smallest"),
        ({"horizon": 1000}, "10 times largest"),
        ({"octaves": [0, 1]}, "octaves three"),
    ],
)
def test_settings_that_do_not_fit(changes: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        AdaptiveBatch(dataclasses.replace(SETTINGS, **changes)).check()


def test_another_method_is_a_user_error(config: Config):
    with pytest.raises(UserError, match="study.method=sgd_linear"):
        AdaptiveBatch(dataclasses.replace(SETTINGS, method="sgd_linear")).jobs(config, [])


def test_from_the_configuration_to_the_report(config: Config, tmp_path: Path):
    small = dataclasses.replace(SETTINGS, seeds=[0, 1], batch_sizes=[32], smallest=16, points=2)
    run_study(dataclasses.replace(config, directory=str(tmp_path), study=small), tmp_path)
    assert len(Summary.load(tmp_path).findings) >= 13


def test_all_contenders_differ():
    everyone = contenders(SETTINGS)
    assert len(set(everyone.values())) == len(everyone) == 8
    assert all(one != other for (a, one), (b, other) in product(everyone.items(), repeat=2) if a != b)
    assert np.sum([one.grows for one in everyone.values()]) == 2
