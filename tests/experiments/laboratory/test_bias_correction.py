from __future__ import annotations

import dataclasses
import math
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from experiments.config import compose_config
from experiments.errors import UserError
from experiments.jobs import Result
from experiments.laboratory.bias_correction.moments import VARIANTS
from experiments.laboratory.bias_correction.runs import POINTS, trained
from experiments.laboratory.bias_correction.study import BiasCorrection
from experiments.laboratory.digits import log_spaced
from experiments.laboratory.schemas import BiasCorrectionConfig
from experiments.launch import run_study
from experiments.report import Summary
from experiments.study import Outcome
from experiments.themes import DARK, LIGHT, image

SETTINGS = BiasCorrectionConfig(
    name="bias_correction",
    seeds=[0, 1, 2],
    workers=1,
    batch_size=16,
    epochs=2,
    early_epochs=1,
    betas=(0.9, 0.999),
    eps=1e-8,
    lr=4e-3,
    octaves=[-1, 0, 1],
    warmups=[0, 512],
)
COUNTS = log_spaced(16, 2, POINTS)


def outcome(losses: dict[str, float], noise: float = 0.01) -> Outcome:
    """Final losses of the variants; half an octave off the best learning rate costs a tenth."""
    random = np.random.default_rng(0)
    results = [
        Result(
            {"variant": variant, "warmup": warmup, "lr": 4e-3 * 2**octave, "seed": seed},
            [
                loss * math.exp(0.1 * octave**2 + noise * random.normal()) * (COUNTS[-1] / count) ** 0.5
                for count in COUNTS
            ],
            1.0,
        )
        for (variant, loss), warmup, octave, seed in product(
            losses.items(), SETTINGS.warmups, SETTINGS.octaves, SETTINGS.seeds
        )
    ]
    return BiasCorrection(SETTINGS).outcome(results)


CORRECTION = dict.fromkeys(VARIANTS, 0.1) | {"adam_none": 0.2, "rmsprop": 0.2}
ORDER = dict.fromkeys(VARIANTS, 0.1) | {"rmsprop": 0.2, "rmsprop_both": 0.2}
NOTHING = dict.fromkeys(VARIANTS, 0.1)


@pytest.mark.parametrize(
    ("losses", "noise", "verdicts"),
    [
        (CORRECTION, 0.01, ["holds", "holds", "holds"]),
        (ORDER, 0.01, ["holds", "does not hold", "cannot be judged"]),
        (NOTHING, 0.3, ["cannot be judged"] * 3),
        (NOTHING | {"adam": 0.2}, 0.01, ["does not hold", "cannot be judged", "does not hold"]),
    ],
)
def test_findings_come_out_either_way(losses: dict[str, float], noise: float, verdicts: list[str]):
    assert [finding.verdict for finding in outcome(losses, noise).findings[:3]] == verdicts


def test_the_sentences_have_the_ratios():
    """A factor of two between variants, and sqrt(2) between one epoch and two."""
    found = outcome(CORRECTION, noise=0.0)
    assert "Adam's is 0.100 [0.100, 0.100], RMSProp's 0.200" in found.findings[0].sentence
    assert "0.500 [0.500, 0.500] times that of Adam without" in found.findings[2].sentence
    assert "mean alone makes it 0.500" in found.findings[2].sentence
    early = found.findings[6]
    assert early.bar.startswith("Loss after") and "Adam's is 0.14" in early.sentence
    assert found.tables[0].columns[1:] == [f.bar.split(":")[0] for f in found.findings[::3]]
    assert found.tables[1].rows[0][1] == "0.004, 0"


def test_the_edge_of_the_grid_is_told():
    assert not any("The tuned lr" in finding.sentence for finding in outcome(NOTHING).findings)
    study = BiasCorrection(dataclasses.replace(SETTINGS, octaves=[0, 1]))
    falling = [
        Result({"variant": v, "warmup": w, "lr": 2.0**o, "seed": s}, [2.0**-o] * len(COUNTS), 1.0)
        for v, w, o, s in product(VARIANTS, SETTINGS.warmups, [0, 1], SETTINGS.seeds)
    ]
    assert "beyond it, for: Adam (Final loss, no warm-up)" in study.outcome(falling).findings[-1].sentence


def test_the_longest_warm_up_is_told():
    study = BiasCorrection(SETTINGS)
    rising = [
        Result({"variant": v, "warmup": w, "lr": 2.0**o, "seed": s}, [2.0 ** (o * o - w / 512)] * len(COUNTS), 1.0)
        for v, w, o, s in product(VARIANTS, SETTINGS.warmups, SETTINGS.octaves, SETTINGS.seeds)
    ]
    notes = [finding.sentence for finding in study.outcome(rising).findings if finding.verdict is None]
    assert len(notes) == 1 and notes[0].startswith("The tuned warm-up lies at an edge of the grid")
    assert "no warm-up" not in notes[0]


def test_results_of_other_variants_are_refused():
    with pytest.raises(ValueError, match="not of"):
        outcome({"adam": 0.1, "rmsprop": 0.2})


def test_the_figure_is_drawn_in_both_themes():
    found = outcome(CORRECTION)
    assert len({image(found.draw(theme), "png") for theme in (LIGHT, DARK)}) == 2


def test_warm_ups_begin_with_none():
    with pytest.raises(UserError, match="study.warmups"):
        BiasCorrection(dataclasses.replace(SETTINGS, warmups=[512, 0])).check()


def test_a_run_learns_and_repeats():
    curve = trained("adam", 64, 4e-3, 0, 16, 0.5, 0.9, 0.999, 1e-8)
    assert curve[-1] < 0.9 * curve[0]
    assert trained("adam", 64, 4e-3, 0, 16, 0.5, 0.9, 0.999, 1e-8) == curve
    assert trained("adam", 64, 1e30, 0, 16, 0.5, 0.9, 0.999, 1e-8)[-1] == pytest.approx(math.log(10), rel=0.1)


def test_from_the_configuration_to_the_report(tmp_path: Path):
    config = compose_config(["experiment=short/bias_correction", "tracker=none"])
    small = dataclasses.replace(SETTINGS, seeds=[0, 1], octaves=[0, 1], warmups=[0], epochs=0.1, early_epochs=0.05)
    run_study(dataclasses.replace(config, study=small), tmp_path)
    assert len(Summary.load(tmp_path).findings) >= 12
