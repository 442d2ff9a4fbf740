from __future__ import annotations

import dataclasses
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import gradstats
from experiments import laboratory
from experiments.config import compose_config
from experiments.errors import UserError
from experiments.jobs import Result
from experiments.laboratory.gradient_diversity.findings import BY_CHANCE
from experiments.laboratory.gradient_diversity.follow import Forgetting, examples_at
from experiments.laboratory.gradient_diversity.look import (
    DIFFERENT,
    ERROR,
    FORGETTING,
    LOSS,
    NORM,
    SAME,
    WRONG_TO_GIVEN,
    WRONG_TO_TRUE,
    pairs,
    singles,
)
from experiments.laboratory.gradient_diversity.study import GradientDiversity
from experiments.laboratory.gradient_diversity.wrong_labels import area_under_curve, planted, share_found
from experiments.laboratory.problem import build
from experiments.laboratory.schemas import GradientDiversityConfig
from experiments.launch import run_study
from experiments.report import Summary
from experiments.study import Outcome
from experiments.themes import DARK, LIGHT, image

PROBLEM = "data=digits model=mlp model.widths=[8] model.dropout=0"
SETTINGS = GradientDiversityConfig(
    name="gradient_diversity",
    seeds=[0, 1, 2],
    workers=1,
    method="adam",
    shares=[0, 0.1],
    epochs=[0, 1, 8],
    early=1,
    sample=60,
)


def test_planted_labels_are_never_the_true_ones_and_depend_on_the_seed():
    labels = torch.arange(1000) % 10
    moved, wrong = planted(labels, 10, 0.1, 0)
    assert wrong.sum() == 100 and ((moved != labels).numpy() == wrong).all()
    assert int(moved.min()) == 0 and int(moved.max()) == 9
    shifts = ((moved - labels) % 10)[torch.from_numpy(wrong)]
    assert set(shifts.tolist()) == set(range(1, 10))
    again, other = planted(labels, 10, 0.1, 0), planted(labels, 10, 0.1, 1)
    assert torch.equal(again[0], moved) and not torch.equal(other[0], moved)
    assert torch.equal(planted(labels, 10, 0, 0)[0], labels)


def test_share_found_counts_ties_by_chance():
    wrong = np.array([True, False, True, False])
    assert share_found(np.array([4.0, 3.0, 2.0, 1.0]), wrong, 2) == 0.5
    assert share_found(np.array([4.0, 3.0, 2.0, 1.0]), wrong, 3) == 1
    # One of three at the edge is flagged, of which one is wrong.
    assert share_found(np.array([4.0, 1.0, 1.0, 1.0]), wrong, 2) == pytest.approx((1 + 1 / 3) / 2)
    assert share_found(np.array([np.inf, 0.0, np.inf, 0.0]), wrong, 2) == 1


def test_area_is_the_share_of_pairs_in_order():
    random = np.random.default_rng(0)
    score, wrong = random.integers(0, 5, size=40).astype(float), random.random(40) < 0.3
    order = np.sign(score[wrong][:, None] - score[~wrong])
    assert area_under_curve(score, wrong) == pytest.approx((order.mean() + 1) / 2)


@pytest.fixture(scope="module")
def looked() -> dict[str, Any]:
    """Sixty examples with labels of which every sixth is wrong, and their gradients one by one (N, P)."""
    data, model = build(PROBLEM, 0)
    x, true = data.train.x[:60].double(), data.train.y[:60]
    given = true.clone()
    given[::6] = (given[::6] + 3) % 10
    model = model.double()
    rows = gradstats.per_example_gradients(model, F.cross_entropy, x, given)
    gradients = torch.cat([g.flatten(1) for g in rows.values()], dim=1)
    return {"model": model, "x": x, "true": true, "given": given, "gradients": gradients}


def test_pairs_against_gradients_one_by_one(looked: dict[str, Any]):
    found = pairs(looked["model"], looked["x"], looked["given"], looked["true"])
    true, given, g = looked["true"].tolist(), looked["given"].tolist(), looked["gradients"]
    unit = F.normalize(g)
    expected: dict[str, list[tuple[int, int]]] = {kind: [] for kind in found.cosine}
    for a, b in product(range(60), repeat=2):
        if a == b or given[b] != true[b]:
            continue
        if given[a] == true[a]:
            expected[SAME if given[a] == given[b] else DIFFERENT].append((a, b))
        elif given[b] == true[a]:
            expected[WRONG_TO_TRUE].append((a, b))
        elif given[b] == given[a]:
            expected[WRONG_TO_GIVEN].append((a, b))
    for kind, chosen in expected.items():
        assert found.cosine[kind] == pytest.approx(np.mean([float(unit[a] @ unit[b]) for a, b in chosen]), abs=1e-12)
        assert found.product[kind] == pytest.approx(np.mean([float(g[a] @ g[b]) for a, b in chosen]), abs=1e-12)


def test_scores_and_the_bound_in_closed_form(looked: dict[str, Any]):
    found = singles(looked["model"], dataclasses.replace(build(PROBLEM, 0)[0].train, x=looked["x"], y=looked["given"]))
    g, n = looked["gradients"], 60
    torch.testing.assert_close(found.scores[NORM], g.norm(dim=1))
    logits = looked["model"](looked["x"]).detach()
    torch.testing.assert_close(found.scores[LOSS], F.cross_entropy(logits, looked["given"], reduction="none"))
    # The gradient of the loss in the logits.
    one = torch.autograd.functional.jacobian(lambda z: F.cross_entropy(z, looked["given"], reduction="sum"), logits)
    torch.testing.assert_close(found.scores[ERROR], one.norm(dim=1))
    diversity = g.square().sum() / g.sum(0).square().sum()
    assert found.bound == pytest.approx(float(n * diversity))
    scale = gradstats.compute(
        looked["model"], F.cross_entropy, looked["x"], looked["given"], statistics=["variance", "norms"]
    )
    trace = sum(float(s2.sum()) for s2 in scale.variance.values()) * (n - 1) / n
    assert found.bound == pytest.approx(1 + trace / float(g.mean(0).square().sum()))


def test_forgetting_events():
    seen = np.array([[1, 1, 1], [0, 1, 0], [1, 1, 0], [0, 1, 0]], dtype=bool)
    counted = Forgetting(3)
    for right in seen:
        counted.note(right)
    assert counted.score().tolist() == [2, 0, 1]
    never = Forgetting(1)
    never.note(np.array([False]))
    assert never.score().tolist() == [np.inf]


def outcome(
    precision: tuple[float, float, float] = (0.1, 0.9, 0.5),
    norm: float = 0.9,
    loss: float = 0.8,
    initial: float = 0.7,
    forgetting: float = 0.95,
    learnt: float = 0.9,
    cosine: tuple[float, float] = (0.6, 0.0),
    against: float = -0.3,
    bounds: tuple[float, float, float] = (50.0, 60.0, 200.0),
    wrong_bound: float = 2.0,
) -> Outcome:
    random = np.random.default_rng(0)

    def look(i: int, share: float) -> dict[str, Any]:
        def near(value: float) -> float:
            return value + 0.002 * random.normal()

        same = cosine[0] - 0.2 * i * (cosine[0] - cosine[1])
        kinds = {SAME: same, DIFFERENT: cosine[1], WRONG_TO_TRUE: against, WRONG_TO_GIVEN: 0.2}
        told: dict[str, Any] = {
            "examples": [0, 1440, 11488][i],
            "cosine": {kind: near(value) for kind, value in kinds.items()},
            "product": kinds,
            "bound": near(bounds[i] * (wrong_bound if share else 1.0)),
            "loss": 1.0,
            "test_accuracy": near(0.9),
        }
        areas = {NORM: norm if i else initial, ERROR: norm, LOSS: loss, FORGETTING: forgetting}
        return told | {
            "found": {score: near(precision[i]) for score in areas},
            "twice": {score: near(precision[i]) for score in areas},
            "area": {score: near(area) for score, area in areas.items()},
            "learnt": near(learnt * i / 2),
            "right": 0.5,
        }

    results = [
        Result({"share": float(share), "seed": seed, "batch_size": 16}, [look(i, share) for i in range(3)], 1.0)
        for share, seed in product(SETTINGS.shares, SETTINGS.seeds)
    ]
    return GradientDiversity(SETTINGS).outcome(results)


def test_findings_come_out_both_ways():
    good = [finding for finding in outcome().findings if finding.verdict]
    assert len(good) == 13 and {finding.verdict for finding in good} == {"holds"}
    bad = outcome(
        precision=(0.1, 0.5, 0.9),
        norm=0.7,
        loss=0.8,
        initial=0.5,
        forgetting=0.6,
        cosine=(0.0, 0.1),
        against=0.1,
        bounds=(50.0, 10.0, 20.0),
        wrong_bound=0.5,
    )
    kept = [finding.bar for finding in bad.findings if finding.verdict == "holds"]
    assert len(kept) == 1 and "EL2N" in kept[0]  # which has the norm's area
    assert sum(finding.verdict == "does not hold" for finding in bad.findings) == 12


def test_labels_that_are_not_learnt_by_heart_judge_nothing():
    (finding,) = (f for f in outcome(learnt=0.2).findings if "by heart" in f.bar)
    assert finding.verdict == "cannot be judged"


def test_the_sentences_have_the_numbers():
    found = outcome()
    assert "is 0.9" in found.findings[0].sentence and "from epoch 1 to 8" in found.findings[1].sentence.lower()
    assert str(BY_CHANCE) in next(f.bar for f in found.findings if "initial model" in f.bar)
    assert len({image(found.draw(theme), "png") for theme in (LIGHT, DARK)}) == 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"shares": [0.1, 0.2]}, "study.shares"),
        ({"shares": [0, 0.6]}, "below 0.5"),
        ({"epochs": [1, 2, 3]}, "begin with 0"),
        ({"early": 8}, "study.early=8"),
    ],
)
def test_wrong_settings_are_a_user_error(values: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        laboratory.load(dataclasses.replace(SETTINGS, **values))


def test_dropout_is_a_user_error():
    with pytest.raises(UserError, match="model.dropout must be 0"):
        GradientDiversity(SETTINGS).jobs(compose_config(["model.dropout=0.5"]), [])


def test_counts_are_whole_batches():
    assert [examples_at(epochs, 1437, 16) for epochs in (0, 0.5, 1, 2)] == [0, 720, 1440, 2880]


def test_from_the_configuration_to_the_report(tmp_path: Path):
    config = compose_config(["experiment=short/gradient_diversity", "tracker=none", "model.widths=[8]"])
    small = dataclasses.replace(SETTINGS, seeds=[0, 1], epochs=[0, 0.25, 1], early=0.25)
    run_study(dataclasses.replace(config, study=small), tmp_path)
    assert len(Summary.load(tmp_path).findings) >= 13
