"""Whatever is wrong ends with one message that names it and the way out, and with an exit code, never a traceback."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from experiments import checkpoint, record, train
from experiments.errors import UserError, as_user_errors, choose
from gradstats import CoverageError

# overrides, exit code (1 is Hydra's own), what the message says
CASES = {
    "misspelt key": (["train.epoch=3"], 1, ["train.epoch", "not in"]),
    "wrong type": (["seed=abc"], 1, ["seed", "abc", "Integer"]),
    "wrong choice": (["train.decay=step"], 1, ["decay", "none, linear, cosine"]),
    "key of another method": (["optimizer=sgd_linear", "optimizer.eps=1e-8"], 1, ["eps"]),
    "unknown experiment": (["experiment=digit"], 1, ["experiment/digit", "digits"]),
    "unknown optimizer": (["optimizer=lion"], 1, ["optimizer/lion", "adam_linear"]),
    "misspelt key of a study": (["experiment=demo", "study.sedes=[0]"], 1, ["study.sedes", "not in"]),
    "wrong type in a study": (["experiment=demo", "study.seeds=many"], 1, ["study.seeds"]),
    "empty list in a study": (["experiment=demo", "study.seeds=[]"], 2, ["study.seeds: []", "one value or more"]),
    "no data file": (["data=npz"], 2, ["data.path"]),
    "missing data file": (["data=npz", "data.path=a.npz"], 2, ["data.path=a.npz", "give an .npz file"]),
    "batch larger than the data": (["train.batch_size=2048", "evaluation.multiple=2048"], 2, ["2048", "1437"]),
    "batch between evaluations": (["train.batch_size=48"], 2, ["evaluation.multiple=256", "multiple of 48"]),
    "negative": (["train.epochs=-1"], 2, ["train.epochs=-1", "must be positive"]),
    "warm-up longer than the run": (["train.warmup_examples=9999"], 2, ["9999", "less than"]),
    "NaN": (["optimizer=sgd_linear", "optimizer.lr=1e30"], 2, ["step 2,", "examples [", "Lower optimizer.lr"]),
    "refused by the optimizer": (["optimizer.betas=[0.9,1.5]"], 2, ["betas", "1.5"]),
    "unknown engine": (["engine.name=jax"], 2, ["engine.name=jax", "fused, vmap, opacus"]),
    "engine with a loop of its own": (
        ["engine.name=microbatch"],
        2,
        ["engine.name=microbatch", "fused, vmap, opacus"],
    ),
    "part of what an engine gathers": (["engine=opacus", "engine.every=8"], 2, ["every", "engine='fused'"]),
    "part of what is not counted": (["engine.fraction=0.5", "optimizer=microbatch_adamw"], 2, ["fraction=0.5"]),
    "part that an optimizer cannot use": (["engine.every=8", "optimizer=adascale"], 2, ["AdaScale", "every"]),
    "no such part": (["engine.every=0"], 2, ["every=0"]),
    "checkpoint between": (["engine.every=3"], 2, ["train.checkpoint_every_examples=8192", "= 48"]),
    "precision of another engine": (["engine=vmap", "engine.statistics_dtype=bfloat16"], 2, ["statistics_dtype"]),
    "unknown tracker": (["tracker.name=mlflow"], 2, ["tracker.name=mlflow", "wandb, none"]),
    "no directory to resume": (["resume=true"], 2, ["directory=PATH"]),
    "model and data do not fit": (["model=convnet", "model.groups=5"], 2, ["model.groups=5"]),
}


@pytest.mark.parametrize("case", CASES)
def test_the_message_names_the_thing_and_the_way_out(case: str, launch: Callable) -> None:
    overrides, code, words = CASES[case]
    outcome = launch(*overrides)
    assert outcome.code == code, outcome.err
    assert all(word in outcome.err for word in words), outcome.err
    assert "Traceback" not in outcome.err
    assert code == 1 or outcome.err.count("error:") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(launch: Callable) -> None:
    outcome = launch("device=cuda")
    assert outcome.code == 2 and "use device=cpu or device=auto" in outcome.err


def test_optimizer_without_statistics(launch: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "attach_statistics", lambda *arguments, **options: None)
    outcome = launch()
    assert outcome.code == 2 and "error: gradstats: no statistics" in outcome.err and "attach" in outcome.err


def test_model_that_cannot_be_covered(launch: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.BatchNorm1d(10))
    monkeypatch.setattr(train, "build_model", lambda *arguments: model)
    outcome = launch()
    assert outcome.code == 2 and "error: gradstats:" in outcome.err and "BatchNorm" in outcome.err


def test_corrupt_checkpoint(launch: Callable, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    assert launch("directory=run", "optimizer=adam").code == 0
    (directory / record.FILE).unlink()
    path = directory / checkpoint.FILE
    path.write_bytes(path.read_bytes()[:-100])
    outcome = launch("directory=run", "optimizer=adam", "resume=true")
    assert outcome.code == 2 and f"the checkpoint {path} is damaged" in outcome.err and "Traceback" not in outcome.err


def test_a_run_tells_its_result_and_how_it_was_resumed(launch: Callable, tmp_path: Path) -> None:
    first = launch("directory=run", "optimizer=adam", "resume=true")
    assert first.code == 0 and f"nothing to resume in {tmp_path / 'run'} yet" in first.err
    assert "Adam, fixed, B = 16: 2,816 examples in" in first.out and f"written to {tmp_path / 'run'}" in first.out
    second = launch("directory=run", "optimizer=adam", "resume=true")
    assert second.code == 0 and "finished" in second.err and second.out == first.out
    third = launch("directory=run", "optimizer=adam")
    assert third.code == 2 and "add resume=true" in third.err


def test_a_failed_run_of_a_sweep_leaves_the_others(tmp_path: Path) -> None:
    overrides = ["tracker=none", "train.epochs=1", "train.warmup_examples=0", "optimizer=sgd_linear"]
    overrides += ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    command = ["experiments.train", "--multirun", *overrides, "optimizer.lr=1e30,0.1", f"directory={tmp_path}"]
    root = Path(__file__).resolve().parents[2]
    ended = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, cwd=root)
    assert ended.returncode == 1 and "error: the loss is not finite at step 2" in ended.stderr
    assert "Traceback" not in ended.stderr
    status = [record.Record.load(tmp_path / job / record.FILE).status for job in ("0", "1")]
    assert status == ["diverged", "finished"]


def test_refusals_of_libraries_become_user_errors() -> None:
    with pytest.raises(UserError, match="gradstats: a refusal"), as_user_errors():
        raise CoverageError("a refusal")
    with pytest.raises(ZeroDivisionError), as_user_errors():
        raise ZeroDivisionError  # a bug keeps its traceback
    with pytest.raises(UserError, match="key=c is unknown: choose one of a, b"):
        choose({"a": 1, "b": 2}, "c", "key")
