from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from experiments import laboratory
from experiments.config import compose_config
from experiments.data import Split
from experiments.errors import UserError
from experiments.estimate import Finding
from experiments.gpt import GPT
from experiments.jobs import Measurement, Result, Training
from experiments.laboratory.along import along, looked_at
from experiments.laboratory.largest_batch.analysis import log_crossing, saturates_at
from experiments.laboratory.largest_batch.findings import BATCHES, EXAMPLES
from experiments.laboratory.largest_batch.look import lengths_of, look, starts_of
from experiments.laboratory.largest_batch.population import gradient, hessian, sharpness, variance
from experiments.laboratory.largest_batch.predictors import DRIFT, EDGE, FARTHEST, HORIZON, NOISE, Tuned, predictions
from experiments.laboratory.largest_batch.study import LargestBatch
from experiments.laboratory.problem import composed, problem_of
from experiments.laboratory.schemas import LargestBatchConfig
from experiments.launch import run_study
from experiments.report import Summary
from experiments.schemas.optimizer import SaturatingAdamConfig
from experiments.themes import DARK, LIGHT, image
from tests.experiments.contests import results, settings

pytestmark = pytest.mark.usefixtures("few_resamples")

SMALL = ["model.width=8", "model.layers=1", "model.heads=2"]
NAME, ON_GPT = "largest_batch", "largest_batch_gpt"


def at(B: float, of: Tuned, seed: int) -> dict[str, Any]:
    """A look at which every predictor but the horizon says B."""
    jitter = 1 + 1e-3 * seed
    lengths = lengths_of(16, 1024)
    noise = {"trace": 1.0, "signal": 1 / B * jitter, "drift": [(n / B) ** 2 / B for n in lengths]}
    return {"examples": 1024, "lengths": lengths, "sharpness": of.stability(B), "plain": noise, "scaled": noise}


def findings(
    ends: Callable[[str], float], said: float, slope: float = -1.0, price: float = 1.0, name: str = NAME
) -> list[Finding]:
    """Losses grow as a power of B to where they are broken at `ends`, or a power of the learning rate times that."""
    study = settings(name)
    assert isinstance(study, LargestBatchConfig)
    study = dataclasses.replace(study, batch_sizes=[16, 64, 256, 1024])
    made = results(study, lambda label, B: 0.1, noise=1e-4)
    optimizers = {label: one.optimizer for label, one in LargestBatch(study).contestants().items()}
    for result in made:
        label, octave, B = (result.coordinates[key] for key in ("contestant", "octave", "batch_size"))
        assert isinstance(label, str) and isinstance(octave, float) and isinstance(B, int)
        result.found.lr = optimizers[label].lr * 2.0**octave
        broken = study.broken ** log_share(B, ends(label) * 2.0 ** (slope * octave))
        # No loss counts for more than the first.
        later = [(1 if is_plain(label) else price) * broken * loss for loss in result.found.train_loss[1:]]
        result.found.train_loss = [20.0, *later]
    for label in filter(is_plain, study.contestants):
        overrides = shlex.join(study.contestants[label])
        tuned = Tuned.of(optimizers[label])  # type: ignore[arg-type]
        made += [
            Result({"overrides": overrides, "looks": 1, "seed": s}, [at(said, tuned, s)], 1.0) for s in study.seeds
        ]
    found = laboratory.load(study).outcome(made)
    assert len({image(found.draw(theme), "png") for theme in (LIGHT, DARK)}) == 2
    return [finding for finding in found.findings if finding.verdict is not None]


def is_plain(label: str) -> bool:
    return not label.startswith("saturating")


def log_share(B: float, end: float) -> float:
    """Where B is on the way from 16 to the end, in logarithms."""
    return math.log(B / 16) / math.log(end / 16)


@pytest.mark.parametrize("name", [NAME, ON_GPT])
def test_findings_come_out_both_ways(name: str):
    good = findings(lambda label: 128 if is_plain(label) else 512, said=128, price=0.9, name=name)
    saturating = len(settings(name).contestants) - 3
    # The horizon is that of the configuration: 1,592 and 152 examples, of which one is right.
    expected = ["does not hold"] + ["holds"] * 7 + ["does not hold"]
    expected += ["holds"] * (1 + 4 * saturating) + ["does not hold"] * saturating
    assert [finding.verdict for finding in good] == expected
    assert "R = 16: 128 [128, 128] against 128 [" in good[1].sentence
    assert "mean of 3 methods: -" in good[6].sentence and "slope of -1, within" in good[7].bar
    lr = 4e-3 if name == ON_GPT else 8e-3
    assert "R = 16: -" in good[6].sentence and f"256 at {lr / 2:g}, 128 at {lr:g}; R = 16, " in good[6].sentence
    ends = {EXAMPLES: 700} | {label: 70 for label in settings(name).contestants if not is_plain(label)}
    bad = findings(lambda label: ends.get(label, 128), said=16.5, slope=0.5, price=1.3, name=name)
    assert {finding.verdict for finding in bad[1:-saturating]} == {"does not hold"}
    assert {finding.verdict for finding in bad[-saturating:]} == {"holds"}
    assert "a ratio of 1.3" in bad[-saturating - 1].sentence


def test_half_the_slope_is_of_the_edge_of_stability():
    found = findings(lambda label: 128, said=128, slope=-0.5)
    assert [finding.verdict for finding in found[6:9]] == ["holds", "does not hold", "holds"]


def test_what_does_not_end_within_the_batch_sizes_is_not_judged():
    unknown = findings(lambda label: 1e12, said=1024)
    assert {finding.verdict for finding in unknown[1:14]} == {"cannot be judged"}
    assert "beyond 1024" in unknown[0].sentence and "R = 16: –, with B and lr of none" in unknown[6].sentence
    early = findings(lambda label: 1e12, said=64)
    assert [finding.verdict for finding in early[1:6]] == ["does not hold"] * 5


def test_where_curves_cross():
    limit = math.log(1.25)
    assert log_crossing([16, 64, 256], np.array([0, limit / 2, 3 * limit / 2]), limit) == pytest.approx(math.log(128))
    assert log_crossing([16, 64, 256], np.array([0, 2 * limit, 0]), limit) == pytest.approx(math.log(32))
    assert log_crossing([16, 64], np.array([0, limit / 2]), limit) == math.log(64)


def test_what_a_step_saturates_at():
    def told(name: str) -> list[str]:
        optimizers = [one.optimizer for one in LargestBatch(settings(name)).contestants().values()]
        return [saturates_at(optimizer) for optimizer in optimizers if isinstance(optimizer, SaturatingAdamConfig)]

    extents = ("the model", "each layer", "each coordinate")
    assert told(ON_GPT) == [f"4 times the noise scale of {extent}" for extent in extents]
    assert told(NAME)[:2] == ["the noise scale of the model", "8 times the noise scale of the model"]


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.99])
@pytest.mark.parametrize("above", [0.99, 1.01])
def test_the_edge_of_stability_is_that_of_descent(beta: float, above: float):
    """m <- beta m + (1 - beta) h p, p <- p - step m on a parabola: it diverges above the edge, and not below it."""
    tuned = Tuned(lr=0.1, beta=beta, batch_size=16)
    h = tuned.stability(16) * above
    p, m = 1.0, 0.0
    for _ in range(20_000):
        m = beta * m + (1 - beta) * h * p
        p -= 0.1 * m
        if abs(p) > 1e6:
            break
    assert (abs(p) > 1) == (above > 1)


def test_the_edge_in_closed_form():
    tuned = Tuned(lr=0.1, beta=0.99, batch_size=16)
    assert tuned.horizon == pytest.approx(16 / -math.log(0.99), rel=1e-3)
    for B in (1, 16, 1000):
        assert tuned.edge(tuned.stability(B)) == pytest.approx(B)
    # Far below the horizon (2 + 2 beta) / ((1 - beta) step) is about 4 N / (B step).
    assert tuned.stability(1) == pytest.approx(4 * tuned.horizon * 16 / 0.1, rel=1e-3)
    assert tuned.edge(-1.0) == FARTHEST


def test_predictions_meet():
    tuned = Tuned(0.1, 0.9, 16)
    found = predictions(tuned, at(100, tuned, 0))
    assert [found[name] for name in (EDGE, NOISE, DRIFT)] == pytest.approx([100, 100, 100])
    assert found[HORIZON] == tuned.horizon


def mlp() -> tuple[nn.Module, Split]:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    return model, Split(torch.randn(20, 3).double(), torch.randint(2, (20,)))


def gpt() -> tuple[nn.Module, Split]:
    """Sequences that repeat few words, so that their positions' gradients are correlated."""
    tokens = torch.randint(5, (20, 1)) // torch.tensor([1, 2, 1, 3])
    return GPT(words=5, width=4, layers=1, heads=2, positions=3).double(), Split(tokens[:, :-1], tokens[:, 1:])


def each_alone(model: nn.Module, split: Split) -> Tensor:
    """Gradients of single examples' mean losses, (examples, elements)."""
    found = []
    for x, y in zip(split.x.split(1), split.y.split(1), strict=True):
        logits = model(x)
        loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), y.reshape(-1))
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    return torch.stack(found).double()


@pytest.mark.parametrize("problem", [mlp, gpt])
def test_gradient_and_variance_are_those_of_single_examples(problem: Callable[[], tuple[nn.Module, Split]]):
    model, split = problem()
    each = each_alone(model, split)
    torch.testing.assert_close(gradient(model, split), each.mean(0))
    torch.testing.assert_close(variance(model, split), each.var(0))


@pytest.mark.parametrize("problem", [mlp, gpt])
def test_curvature_is_that_of_the_whole_hessian(problem: Callable[[], tuple[nn.Module, Split]]):
    model, split = problem()
    names, shapes = zip(*((name, p.shape) for name, p in model.named_parameters()), strict=True)
    sizes = [shape.numel() for shape in shapes]

    def loss(vector: Tensor) -> Tensor:
        named = dict(zip(names, map(Tensor.view, vector.split(sizes), shapes), strict=True))
        logits = torch.func.functional_call(model, named, split.x)
        return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), split.y.reshape(-1))

    at_parameters = torch.cat([p.detach().flatten() for p in model.parameters()])
    with sdpa_kernel(SDPBackend.MATH):
        whole = torch.autograd.functional.hessian(loss, at_parameters)
    direction = torch.randn(sum(sizes)).double()
    torch.testing.assert_close(hessian(model, split)(direction), whole @ direction)
    scale = torch.rand(sum(sizes)).double() + 0.1
    expected = torch.linalg.eigvals(whole / scale[:, None]).real.max().item()
    assert sharpness(model, split, scale) == pytest.approx(expected, rel=1e-2)
    # An element of infinite scale is left out.
    scale[: sizes[0]] = torch.inf
    kept = torch.linalg.eigvals(whole[sizes[0] :, sizes[0] :] / scale[sizes[0] :, None]).real.max().item()
    assert sharpness(model, split, scale) == pytest.approx(kept, rel=1e-2)


def test_looks_are_whole_batches_within_the_run():
    assert lengths_of(16, 1024) == [16, 32, 64, 128, 256, 512, 1024]
    starts = starts_of(11264, 3, 1024, 16, warmup=1024)
    assert starts[0] == 1120 and starts[-1] == 11264 - 1024 and len(starts) == 3
    assert starts_of(11264, 3, 1024, 16, warmup=2048)[0] == 2048
    assert starts_of(64, 2, 128, 16, warmup=0) == [16]


def test_a_look_at_a_short_run():
    problem = problem_of(compose_config(["model.dropout=0", "model.widths=[8]"]))
    (found,) = look(problem, "optimizer=batch_invariant_adam", 8e-3, 16, 16, 256, 1, 32, None, 0)
    assert found["lengths"] == [16, 32] and len(found["plain"]["drift"]) == 2
    assert found["sharpness"] > 0 and found["plain"]["trace"] > 0
    assert 0 < found["plain"]["drift"][0] < found["plain"]["drift"][1]


def test_a_look_at_a_sample_of_sequences():
    tiny = ["data.limit=100", "data.context=8", *SMALL]
    problem, overrides = shlex.join(["data=topics", "model=gpt", *tiny]), "optimizer=batch_invariant_adam_r1"
    (found,) = look(problem, overrides, 8e-3, 16, 32, 128, 1, 32, 20, 3)
    optimizer = dataclasses.replace(composed(overrides).optimizer, lr=8e-3)
    start, n = found["examples"], len(found["lengths"])
    looks = along(problem, optimizer, 16, 32, 3, [start + length for length in (0, *found["lengths"])])
    each, weight = [], torch.ones(0)
    for _, data, model, step in looks:
        each.append(each_alone(looked_at(problem, 3, model).double(), data.train.spread(20)))
        if not len(weight):
            roots = torch.cat([step.state[p]["exp_avg_sq"].flatten() for p in model.parameters()]).double().sqrt()
            weight = torch.where(roots > 0, 1 / (roots + 1e-8), 0)
    assert 0 < (weight == 0).sum() < len(weight) / 2  # characters that have not come yet
    mean = [gradients.mean(0) for gradients in each]
    for name, w in (("plain", torch.ones_like(weight)), ("scaled", weight)):
        drift = [float(w @ (mean[i + 1] - mean[0]).square()) for i in range(n)]
        expected = {"signal": float(w @ mean[0].square()), "trace": float(w @ each[0].var(0))}
        assert found[name].pop("drift") == pytest.approx(drift, rel=1e-4)
        assert found[name] == pytest.approx(expected, rel=1e-4)


def test_looks_and_other_batch_sizes_follow_the_tuned_learning_rate():
    study = LargestBatch(settings(NAME))
    config = compose_config(["experiment=short/largest_batch", "model.widths=[8]"])
    made = results(study.settings, lambda label, B: 0.1, best=lambda label, B: 0.0 if B == 16 else -2.0)
    jobs = study.jobs(config, [r for r in made if r.coordinates["batch_size"] == 16])
    looks = [job for job in jobs if isinstance(job, Measurement)]
    assert len(looks) == 3 * len(study.settings.seeds)
    assert {job.coordinates["lr"] for job in looks} == {0.032, 0.008}
    away = [job for job in jobs if isinstance(job, Training) and job.coordinates["batch_size"] == 64]
    for label in study.settings.contestants:
        octaves = {job.coordinates["octave"] for job in away if job.coordinates["contestant"] == label}
        assert octaves == {-1.0, 0.0, 1.0} | ({-2.0} if is_plain(label) else set())
    rising = [r for r in made if r.coordinates["batch_size"] == 16 and r.coordinates["octave"] in (-2.0, -1.0)]
    assert not any(isinstance(job, Measurement) for job in study.jobs(config, rising))


def test_dropout_is_a_user_error():
    study = LargestBatch(settings(NAME))
    with pytest.raises(UserError, match=r"model\.dropout must be 0"):
        study.jobs(compose_config(["experiment=short/largest_batch", "model.dropout=0.5"]), [])
    with pytest.raises(UserError, match="judged_batch_size=48 is none of"):
        LargestBatch(dataclasses.replace(study.settings, judged_batch_size=48)).check()
    wrong = dataclasses.replace(
        study.settings, contestants=study.settings.contestants | {BATCHES: ["optimizer=sgd_linear"]}
    )
    with pytest.raises(UserError, match="R = 16 must be kinds of BatchInvariantAdam"):
        LargestBatch(wrong).check()


TINY = {
    NAME: ["model.widths=[8]"],
    ON_GPT: ["data.context=8", "data.limit=400", "data.evaluated=64", *SMALL],
}


@pytest.mark.parametrize("name", TINY)
def test_from_the_configuration_to_the_report(tmp_path: Path, name: str):
    overrides = ["train.epochs=0.5", "train.warmup_examples=0", "evaluation.multiple=64", *TINY[name]]
    config = compose_config([f"experiment=short/{name}", "tracker=none", *overrides])
    assert isinstance(config.study, LargestBatchConfig)
    small = dataclasses.replace(config.study, seeds=[0], batch_sizes=[32, 64], judged_batch_size=64, looks=1, workers=1)
    if name == ON_GPT:
        small = dataclasses.replace(small, sample=32)
    run_study(dataclasses.replace(config, study=small), tmp_path)
    found = Summary.load(tmp_path).findings
    assert sum(finding.verdict is not None for finding in found) == 10 + 5 * (len(small.contestants) - 3)
