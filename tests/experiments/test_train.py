"""The loop: the same numbers every time, the same examples for every batch size, and nothing lost when it is killed."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from experiments import checkpoint, record
from experiments import train as train_module
from experiments.data import load_data
from experiments.errors import Diverged
from experiments.record import Record
from experiments.sampler import Sampler
from experiments.schemas.run import Config, StatisticsDtype
from experiments.train import train
from gradstats import matmul
from tests.experiments.runs import COMPILES, METHODS, numbers, parameters

Compose = Callable[..., Config]

CPU = torch.device("cpu")
CROSS_ENTROPY = F.cross_entropy


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_numbers(method: str, short: Compose, tmp_path: Path) -> None:
    config = short(f"optimizer={method}", "train.decay=cosine")
    first, second = (train(config, tmp_path / name) for name in ("first", "second"))
    assert numbers(first) == numbers(second)
    assert torch.equal(parameters(tmp_path / "first"), parameters(tmp_path / "second"))
    other = train(dataclasses.replace(config, seed=1), tmp_path / "other")
    assert other.train_loss[0] != first.train_loss[0]
    assert torch.are_deterministic_algorithms_enabled()  # in another process too, where times may differ


def test_a_record_says_what_was_run(short: Compose, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    config = short("optimizer=adam", "train.batch_size=64", "seed=3")
    result = train(config, tmp_path, lambda examples, total, loss: seen.append((examples, total)))
    assert Record.load(tmp_path / record.FILE) == result
    assert (result.method, result.lr, result.batch_size, result.seed) == ("adam", config.optimizer.lr, 64, 3)
    assert result.status == "finished" and result.examples[0] == 0 and result.examples[-1] == 2816
    assert result.train_loss[0] == pytest.approx(2.3, abs=0.1)  # ln 10: the initial model knows nothing
    assert result.train_loss[-1] < 0.6 and result.test_accuracy[-1] > 0.85
    assert set(result.examples) <= {examples for examples, _ in seen} and {total for _, total in seen} == {2816}


@pytest.mark.parametrize("has", [False, True])
def test_rounding_is_real_on_any_processor(
    has: bool, short: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of squares alone: without an optimizer that reads them, nothing is rounded."""
    monkeypatch.setattr(matmul, "_cpu_multiplies_bfloat16", has)
    found = {
        dtype: train(short("optimizer=batch_invariant_adam_r4", f"engine.statistics_dtype={dtype}"), tmp_path / dtype)
        for dtype in StatisticsDtype
    }
    exact, bfloat16, emulated = (found[dtype].train_loss for dtype in StatisticsDtype)
    assert emulated[0] == exact[0] and emulated[-1] != exact[-1] and emulated == pytest.approx(exact, rel=0.05)
    assert bfloat16 == (emulated if has else exact)
    by = ["hardware", "hardware"] if has else [None, "emulated"]
    assert [found[dtype].rounding for dtype in StatisticsDtype] == [None, *by]
    assert train(short("optimizer=adam", "engine.statistics_dtype=emulated"), tmp_path / "adam").rounding is None


def test_batch_sizes_share_evaluations_and_initial_model(short: Compose, tmp_path: Path) -> None:
    results = [train(short("optimizer=adam", f"train.batch_size={B}"), tmp_path / str(B)) for B in (4, 64, 256)]
    assert results[0].examples == results[1].examples == results[2].examples
    assert len({result.train_loss[0] for result in results}) == 1
    assert len({result.train_loss[-1] for result in results}) == 3


def test_ours_is_torch_adam_at_the_batch_size_of_tuning(short: Compose, tmp_path: Path) -> None:
    ours = train(short("optimizer=batch_invariant_adam"), tmp_path / "ours")
    adam = train(short("optimizer=adam"), tmp_path / "adam")
    assert ours.train_loss == pytest.approx(adam.train_loss, rel=1e-3)


def test_the_loop_does_not_wait_for_the_device_between_stops(short: Compose, tmp_path: Path) -> None:
    waits = {torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.__bool__, torch.Tensor.__float__, torch.Tensor.cpu}
    waiting: list[str] = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function in waits:
                waiting.append(function.__name__)
            return function(*args, **(kwargs or {}))

    def count(batch_size: int) -> int:
        waiting.clear()
        options = ["optimizer=adam", "train.max_norm=1", f"train.batch_size={batch_size}"]
        with Watch():
            train(short(*options), tmp_path / str(batch_size))
        return len(waiting)

    assert count(16) == count(64) > 0


@pytest.mark.parametrize("options", [["model=convnet"], ["hardware=gpu", "hardware.compile=false", "device=cpu"]])
def test_other_models_and_bfloat16_learn(options: list[str], short: Compose, tmp_path: Path) -> None:
    result = train(short("train.batch_size=64", "optimizer=batch_invariant_adam", *options), tmp_path)
    assert result.train_loss[-1] < 0.5 * result.train_loss[0]


@pytest.mark.parametrize("method", ["adam", "batch_invariant_adam"])
def test_a_gpt_learns_more_of_text_than_how_often_a_character_occurs(
    method: str, short: Compose, tmp_path: Path
) -> None:
    options = ["data=topics", "model=gpt", "data.limit=1280", "data.evaluated=64", "train.epochs=4"]
    config = short(*options, f"optimizer={method}", "optimizer.lr=0.002", "train.batch_size=32")
    result, data = train(config, tmp_path), load_data(config.data, CPU)
    frequencies = data.train.y.flatten().bincount(minlength=data.classes) / data.train.y.numel()
    entropy = torch.special.entr(frequencies).sum().item()
    assert result.train_loss[0] == pytest.approx(math.log(data.classes), abs=0.05)
    assert max(result.train_loss[-1], result.test_loss[-1]) < 0.95 * entropy
    assert result.test_accuracy[-1] > frequencies.max().item()


# Opacus hooks a first layer whose input has no gradient, which is what torch warns of.
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("engine", ["vmap", "opacus"])
def test_engines_agree(engine: str, short: Compose, tmp_path: Path) -> None:
    options = ["optimizer=batch_invariant_adam_r1", "train.epochs=0.5", "train.batch_size=64"]
    fused = train(short(*options), tmp_path / "fused")
    other = train(short(*options, f"engine={engine}"), tmp_path / engine)
    assert other.train_loss == pytest.approx(fused.train_loss, rel=1e-3)


def test_single_examples_need_no_look_into_layers(short: Compose, tmp_path: Path) -> None:
    options = ["optimizer=batch_invariant_adam", "train.epochs=0.5", "train.batch_size=1"]
    outside = train(short(*options), tmp_path / "outside")
    inside = train(short(*options, "engine=vmap"), tmp_path / "inside")
    assert outside.train_loss == pytest.approx(inside.train_loss, rel=1e-3)
    assert outside.train_loss[-1] < 0.9 * outside.train_loss[0]


def test_clipping_bounds_the_first_step_of_torch_optimizers(short: Compose, tmp_path: Path) -> None:
    options = ["optimizer=sgd_linear", "train.epochs=0.2", "train.batch_size=256", "train.warmup_examples=0"]
    free = train(short(*options), tmp_path / "free")
    clipped = train(short(*options, "train.max_norm=1e-6"), tmp_path / "clipped")
    assert abs(clipped.train_loss[-1] - clipped.train_loss[0]) < 1e-3 < abs(free.train_loss[-1] - free.train_loss[0])


def test_default_charts_and_detail(short: Compose, tmp_path: Path) -> None:
    charts = {
        "loss/batch",
        "loss/train",
        "loss/test",
        "accuracy/test",
        "optimizer/lr",
        "gradient/norm",
        "gradient/noise_scale",
        "worst_layer/name",
        "worst_layer/signal_to_noise",
        "speed/examples_per_second",
    }
    options = ["optimizer=batch_invariant_adam", "tracker=wandb", "train.log_every_examples=512"]
    train(short(*options), tmp_path / "default")
    default = logged(tmp_path / "default")
    assert charts <= set(default[-1]) and not any(name.startswith(("layers/", "norms/")) for name in default[-1])
    # One line for every 512 examples, every evaluation and the checkpoint at the end, each once.
    counts = [line["examples_seen"] for line in default]
    assert counts == sorted({0, 256, 768, 2816, *range(512, 2816, 512)})
    assert default[-1]["optimizer/lr"] == 0.008

    train(short(*options, "tracker.detail=true", "optimizer=adam"), tmp_path / "detail")
    *_, detail, table = logged(tmp_path / "detail")
    assert table["hardest examples.nrows"] == 32 and table["examples_seen"] == 2816
    assert charts | {"layers/1/gradient_norm", "layers/4/signal_to_noise", "norms/1.weight.values"} <= set(detail)
    assert sum(detail["norms/whole gradient.values"]) == 16


def logged(directory: Path) -> list[dict[str, Any]]:
    (run,) = directory.glob("wandb/offline-run-*")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(run)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return [entry["history"]["item"] for entry in map(json.loads, lines) if entry["type"] == "history"]


def test_the_runs_of_a_sweep_are_in_one_group_with_their_overrides_as_tags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Config] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_module, "run", lambda config, *rest: seen.append(config))
    for options in ([], ["directory=mine"], ["tracker.group=own"]):
        arguments = ["-m", "name=digits", "seed=0,1", f"data.path={'x' * 80}", *options]
        monkeypatch.setattr(sys, "argv", ["experiments.train", *arguments])
        train_module.main()
    groups = [config.tracker.group for config in seen]
    assert groups[0] == groups[1] and re.fullmatch(r"digits 20\d\d-\d\d-\d\d_\d\d-\d\d-\d\d", groups[0] or "")
    assert groups[2:] == ["digits mine"] * 2 + ["own"] * 2
    assert [config.tracker.tags for config in seen[:2]] == [["seed=0"], ["seed=1"]]


def test_interrupting_says_how_to_continue(launch: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train_module, "load_data", interrupt)
    outcome = launch("directory=run")
    assert outcome.code == 130 and "interrupted" in outcome.err and "resume=true directory=" in outcome.err


def poison(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Makes the loss of one training step, counted from 1, not a number."""
    steps = 0

    def cross_entropy(logits: torch.Tensor, y: torch.Tensor, **options: str) -> torch.Tensor:
        nonlocal steps
        steps += torch.is_grad_enabled()
        loss = CROSS_ENTROPY(logits, y, **options)
        return loss * torch.nan if steps == step and torch.is_grad_enabled() else loss

    monkeypatch.setattr(F, "cross_entropy", cross_entropy)


@pytest.mark.parametrize("step", [1, 100, 176])
@pytest.mark.parametrize("method", ["sgd_linear", "batch_invariant_adam"])
def test_divergence_names_step_and_examples_and_keeps_the_last_checkpoint(
    method: str, step: int, short: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, step)
    with pytest.raises(Diverged, match=f"not finite at step {step}, on training examples") as caught:
        train(short(f"optimizer={method}", "train.checkpoint_every_examples=512"), tmp_path)
    batch = slice((step - 1) * 16, step * 16)
    assert caught.value.indices == tuple(Sampler(1437, 16, 0, CPU).stream(0, 2816)[batch].tolist())
    kept = Record.load(tmp_path / record.FILE)
    assert kept.status == "diverged" and kept.examples[-1] < step * 16
    if step == 1:
        assert caught.value.checkpoint is None and "no checkpoint had been written" in str(caught.value)
    else:
        assert caught.value.checkpoint == tmp_path / checkpoint.FILE
        assert parameters(tmp_path).isfinite().all()


def test_a_last_step_that_breaks_the_parameters_is_no_checkpoint(short: Compose, tmp_path: Path) -> None:
    options = ["optimizer=sgd_linear", "optimizer.lr=3e38", "train.batch_size=256", "train.warmup_examples=0"]
    with pytest.raises(Diverged, match="at step 1, .* no checkpoint") as caught:
        train(short(*options, "train.checkpoint_every_examples=256"), tmp_path)
    assert pickle.loads(pickle.dumps(caught.value)).indices == caught.value.indices


@pytest.mark.slow
@COMPILES
@pytest.mark.parametrize("method", ["adam", "batch_invariant_adam"])
def test_compiled_runs_match(method: str, short: Compose, tmp_path: Path) -> None:
    # Without dropout: the compiler draws its random numbers in another way.
    options = [f"optimizer={method}", "train.batch_size=64", "model.dropout=0"]
    plain = train(short(*options), tmp_path / "plain")
    compiled = train(short(*options, "hardware.compile=true"), tmp_path / "compiled")
    assert compiled.train_loss == pytest.approx(plain.train_loss, rel=1e-3)


@pytest.mark.slow
@COMPILES
def test_gpu_settings_run_on_the_cpu(short: Compose, tmp_path: Path) -> None:
    result = train(short("hardware=gpu", "device=cpu", "train.batch_size=64"), tmp_path)
    assert result.train_loss[-1] < 0.5 * result.train_loss[0]
