from __future__ import annotations

import dataclasses
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import laboratory
from experiments.config import compose_config
from experiments.errors import UserError
from experiments.jobs import Job, Measurement, Result
from experiments.laboratory.private.methods import ADAM, CORRECTED, METHODS, SGD
from experiments.laboratory.private.peers import BASES, GHOST, KEPT, OURS
from experiments.laboratory.private.study import Private
from experiments.laboratory.schemas import PrivateConfig
from experiments.launch import run_study
from experiments.report import Summary
from experiments.schemas.run import Config
from experiments.study import Outcome
from experiments.themes import DARK, LIGHT, image

SETTINGS = PrivateConfig(
    name="private",
    seeds=[0, 1, 2],
    workers=1,
    lrs={SGD: 1.0, ADAM: 0.016, CORRECTED: 0.008},
    octaves=[-1, 0, 1],
    epsilons=[1.0, 8.0],
    delta=1e-4,
    max_norm=1.0,
    batch_size=64,
    epochs=1,
    floor=0.1,
    checked_steps=3,
    timed_width=16,
    timed_steps=2,
)


def result_of(
    job: Job,
    accuracy: dict[str, float],
    best: float,
    share: float,
    apart: float,
    scatter: float,
    lost: float,
    free: dict[str, float],
) -> Result:
    """Of a run of which accuracy and loss are known: the best octave, what epsilon takes away, and without privacy."""
    c: Any = job.coordinates
    assert isinstance(job, Measurement)
    if job.function.__name__ == "difference":
        return Result(c, {KEPT: apart, GHOST: apart}, 1.0)
    if job.function.__name__ == "seconds":
        return Result(c, {OURS: [0.01, 0.02, 0.01], KEPT: [0.1, 0.1, 0.1], GHOST: [0.02, 0.02, 0.02]}, 1.0)
    epsilon = c["epsilon"]
    random = np.random.default_rng([c["seed"], METHODS.index(c["method"]), round(epsilon or 0)])
    reached = free.get(c["method"], 0.95) if epsilon is None else accuracy[c["method"]] - lost / epsilon
    off = (c["octave"] - best) ** 2
    found = {
        "loss": (1 - reached) * float(np.exp(0.3 * off)),
        "test_accuracy": reached - 0.02 * off + scatter * random.normal(),
        "epsilon": epsilon and epsilon - 0.01,
        "sigma": 0.0 if epsilon is None else 5 / epsilon,
        "steps": 22,
        "clipped": 0.0 if epsilon is None else 0.7,
        "noise_share": None if c["method"] == SGD else 0.0 if epsilon is None else share,
    }
    return Result(c, found, 1.0)


def config() -> Config:
    return dataclasses.replace(compose_config(["model.dropout=0", "model.widths=[8]"]), study=SETTINGS)


def outcome(
    accuracy: dict[str, float],
    best: float = 0.0,
    share: float = 0.9,
    apart: float = 1e-15,
    scatter: float = 1e-4,
    lost: float = 0.016,
    free: dict[str, float] | None = None,
) -> Outcome:
    study, known = Private(SETTINGS), list[Result]()
    while len(jobs := study.jobs(config(), known)) > len(known):
        known = [result_of(job, accuracy, best, share, apart, scatter, lost, free or {}) for job in jobs]
    return study.outcome(known)


RISING = {SGD: 0.9, ADAM: 0.92, CORRECTED: 0.94}


def test_findings_come_out_both_ways():
    good = [finding for finding in outcome(RISING).findings if finding.verdict]
    assert len(good) == 8 and {finding.verdict for finding in good} == {"holds"}
    falling = {SGD: 0.82, ADAM: 0.81, CORRECTED: 0.8}
    bad = [finding.verdict for finding in outcome(falling, share=0.2, apart=1e-3).findings if finding.verdict]
    assert set(bad) == {"does not hold"}
    unclear = outcome(dict.fromkeys(METHODS, 0.9), scatter=0.05).findings[2:6]
    assert {finding.verdict for finding in unclear} == {"cannot be judged"}


def test_the_sentences_have_the_numbers():
    found = outcome(RISING)
    told = [finding.sentence for finding in found.findings]
    assert "at most 1.0e-15 (Opacus)" in told[0]
    assert "DP-SGD is -2.0 [" in told[2] and "DP-Adam 90.4 [" in told[2]
    assert any("DP-AdamBC, the method with the lowest training loss there, is 1.2 [" in text for text in told)
    assert any("takes 10.0 ms" in text and "10.0 [10.0, 10.0] times with Opacus" in text for text in told)
    assert not any("edge" in text for text in told)
    assert len({image(found.draw(theme), "png") for theme in (LIGHT, DARK)}) == 2


def test_privacy_is_paid_for_from_the_best_without_it():
    """Whichever that is: a method that is poor in any case does not make privacy cheap."""
    poor = outcome(RISING, free={SGD: 0.99, CORRECTED: 0.94})
    (cheap,) = [finding for finding in poor.findings if "privacy costs" in finding.bar]
    assert cheap.verdict == "does not hold"
    assert "DP-AdamBC, the method with the lowest training loss there, is 5.2 [" in cheap.sentence
    assert "% of the one with the lowest without privacy (DP-SGD)." in cheap.sentence


def test_grids_grow_until_the_best_has_neighbours():
    found = outcome(RISING, best=2.0)
    assert not any("edge" in finding.sentence for finding in found.findings)
    lrs = [row[2] for row in found.tables[1].rows]
    assert lrs[:3] == ["4", "0.064", "0.032"]


def test_every_method_has_the_same_grid():
    jobs = [job for job in Private(SETTINGS).jobs(config(), []) if "octave" in job.coordinates]
    assert len(jobs) == 3 * 3 * 3 * 3
    grids: dict[Any, set[Any]] = {}
    for c in (job.coordinates for job in jobs):
        grids.setdefault((c["method"], c["epsilon"]), set()).add((c["octave"], c["seed"]))
    assert set(grids) == set(product(METHODS, (1.0, 8.0, None)))
    assert set(map(frozenset, grids.values())) == {frozenset(product((-1.0, 0.0, 1.0), (0, 1, 2)))}
    checks = [job for job in Private(SETTINGS).jobs(config(), []) if "base" in job.coordinates]
    assert len(checks) == 3 * (len(BASES) + 1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lrs": {SGD: 1.0}}, "study.lrs must have"),
        ({"octaves": [0, 1]}, "three or more"),
        ({"epsilons": [8.0, 1.0]}, "study.epsilons"),
        ({"epsilons": [0.0, 1.0]}, "study.epsilons"),
    ],
)
def test_wrong_settings_are_a_user_error(values: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        laboratory.load(dataclasses.replace(SETTINGS, **values))


@pytest.mark.parametrize("overrides", [["model.dropout=0.5"], ["model=convnet", "data=digits"]])
def test_other_models_are_a_user_error(overrides: list[str]):
    with pytest.raises(UserError, match="model.dropout=0 here"):
        Private(SETTINGS).jobs(compose_config(overrides), [])


def test_opacus_must_be_there(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "opacus.accountants", None)
    with pytest.raises(UserError, match="pip install opacus"):
        Private(SETTINGS).jobs(config(), [])


def test_from_the_configuration_to_the_report(tmp_path: Path):
    composed = compose_config(["experiment=short/private", "tracker=none", "model.widths=[8]"])
    small = dataclasses.replace(SETTINGS, seeds=[0, 1], epsilons=[8.0], epochs=0.2)
    run_study(dataclasses.replace(composed, study=small), tmp_path)
    assert len(Summary.load(tmp_path).findings) >= 6
