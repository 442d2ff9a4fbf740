"""Processes that share a run: the same learning curve, one directory, one message, and nothing lost between them."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from torch import Tensor, nn

from experiments import checkpoint, distributed, history, record
from experiments import train as train_module
from experiments.config import CONF, compose_config
from experiments.data import Split
from experiments.distributed import ALONE, Process, refuse_processes, this_process
from experiments.errors import Diverged, UserError
from experiments.record import Record
from experiments.sampler import Sampler
from experiments.train import evaluate, train
from tests.experiments.conftest import SHORT
from tests.experiments.ranks import alone, as_process, command, train_exactly
from tests.experiments.runs import numbers, parameters
from tests.ranks import Ranks

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]
CROSS_ENTROPY = F.cross_entropy


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    with Ranks(2, as_process) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def four() -> Iterator[Ranks]:
    with Ranks(4, as_process) as ranks:
        yield ranks


def same_curve(found: Record, expected: Record) -> None:
    for name in ("train_loss", "test_loss", "test_accuracy"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-9), name
    unequal: dict[str, Any] = {"train_loss": [], "test_loss": [], "test_accuracy": []}
    assert numbers(dataclasses.replace(found, **unequal)) == numbers(dataclasses.replace(expected, **unequal))


UNEVEN = ["train.batch_size=15", "evaluation.multiple=255"]
CURVES = {
    "adam": ["optimizer=adam"],
    "clipped": ["optimizer=sgd_linear", "train.max_norm=0.1"],
    "7 and 8 of 15": ["optimizer=adam", *UNEVEN],
    "ours": ["optimizer=batch_invariant_adam_r1", "tracker.detail=true"],
    "ours, R above B": ["optimizer=batch_invariant_adam", "train.batch_size=8"],
    "ours, 7 and 8 of 15": ["optimizer=batch_invariant_adam_r1", "train.max_norm=0.1", *UNEVEN],
}


def check_curve(ranks: Ranks, overrides: list[str], folder: Path) -> None:
    """Dropout included: a mask belongs to the position in the stream of examples, whoever draws it."""
    first, *others = ranks(train_exactly, overrides, folder / "together")
    assert all(numbers(first) == numbers(other) for other in others)
    same_curve(first, alone(overrides, folder / "alone"))
    torch.testing.assert_close(parameters(folder / "together"), parameters(folder / "alone"), rtol=1e-9, atol=1e-12)
    one, other = ([list(line) for line in history.load(folder / name)] for name in ("alone", "together"))
    assert one == other


@pytest.mark.parametrize("case", [*CURVES])
def test_two_processes_have_the_learning_curve_of_one(case: str, two: Ranks, tmp_path: Path) -> None:
    check_curve(two, [*SHORT, *CURVES[case]], tmp_path)


def trained(process: Process, overrides: list[str], directory: Path) -> Record:
    return train(compose_config(overrides), directory, process=process)


@pytest.mark.parametrize("method", ["adam", "batch_invariant_adam_r1"])
def test_in_float32_they_differ_by_the_order_of_sums(method: str, two: Ranks, tmp_path: Path) -> None:
    overrides = [*SHORT, f"optimizer={method}", "train.batch_size=64"]
    first, second = two(trained, overrides, tmp_path / "together")
    assert numbers(first) == numbers(second)
    assert first.train_loss == pytest.approx(trained(ALONE, overrides, tmp_path / "alone").train_loss, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("case", [*CURVES])
def test_four_processes_have_the_learning_curve_of_one(case: str, four: Ranks, tmp_path: Path) -> None:
    check_curve(four, [*SHORT, *CURVES[case]], tmp_path)


def test_another_number_of_processes_continues(two: Ranks, tmp_path: Path) -> None:
    overrides = [*SHORT, "optimizer=adam", "resume=true", "train.checkpoint_every_examples=1408"]
    whole = {"one": alone(overrides, tmp_path / "one"), "two": two(train_exactly, overrides, tmp_path / "two")[0]}
    for name in whole:
        (tmp_path / f"{name} continued").mkdir()
        shutil.copy(tmp_path / name / checkpoint.PREVIOUS, tmp_path / f"{name} continued" / checkpoint.FILE)
    same_curve(alone(overrides, tmp_path / "two continued"), whole["two"])
    same_curve(two(train_exactly, overrides, tmp_path / "one continued")[0], whole["one"])


def evaluated(process: Process) -> tuple[float, float]:
    torch.manual_seed(0)
    split = Split(torch.randn(1000, 6), torch.arange(1000) % 3)
    with mock.patch.object(train_module, "EVALUATION_TARGETS", 64):
        return evaluate(nn.Linear(6, 3), split, nullcontext(), process)


def test_an_evaluation_is_the_same_bit_for_bit(two: Ranks) -> None:
    assert two(evaluated) == [evaluated(ALONE)] * 2


def poisoned(process: Process, directory: Path) -> Record:
    """The second process has a loss that is not a number, at its 100th step."""
    steps = 0

    def cross_entropy(logits: Tensor, y: Tensor, **options: str) -> Tensor:
        nonlocal steps
        steps += torch.is_grad_enabled()
        loss = CROSS_ENTROPY(logits, y, **options)
        return loss * torch.nan if steps == 100 and process.rank == 1 and torch.is_grad_enabled() else loss

    config = compose_config([*SHORT, "optimizer=adam", "train.checkpoint_every_examples=512"])
    with mock.patch.object(F, "cross_entropy", cross_entropy):
        return train(config, directory, process=process)


def test_a_loss_that_is_no_number_in_one_process_stops_all(two: Ranks, tmp_path: Path) -> None:
    errors = two(poisoned, tmp_path)
    assert [type(error) for error in errors] == [Diverged, Diverged] and str(errors[0]) == str(errors[1])
    assert errors[0].step == 100 and errors[0].checkpoint == tmp_path / checkpoint.FILE
    assert errors[0].indices == tuple(Sampler(1437, 16, 0, CPU).stream(99 * 16, 100 * 16).tolist())
    assert Record.load(tmp_path / record.FILE).status == "diverged"
    assert parameters(tmp_path).isfinite().all()


def full(process: Process, directory: Path) -> tuple[int, str, str]:
    """The disk is full at the second checkpoint."""
    sync, done = os.fsync, []

    def fsync(descriptor: int) -> None:
        if "checkpoint" in os.readlink(f"/proc/self/fd/{descriptor}"):
            done.append(descriptor)
        if len(done) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    with mock.patch.object(os, "fsync", fsync):
        options = ["optimizer=adam", "train.checkpoint_every_examples=512", f"directory='{directory}'"]
        return command(process, [*SHORT, *options])


def told_once(outcomes: list[tuple[int, str, str]]) -> str:
    """The message; the first process has it."""
    assert [code for code, _, _ in outcomes] == [2] * len(outcomes)
    (_, _, message), *others = outcomes
    assert message.count("error:") == 1 and "Traceback" not in message
    assert all("error:" not in err for _, _, err in others)
    return message


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs to know which file is written")
def test_a_full_disk_stops_all_with_one_message_and_leaves_the_last_checkpoint(two: Ranks, tmp_path: Path) -> None:
    message = told_once(two(full, tmp_path / "run"))
    assert "No space left on device" in message and "checkpoint.pt" in message and "resume=true" in message
    state = checkpoint.load(tmp_path / "run" / checkpoint.FILE, CPU)
    assert state["sampler"]["position"] == 512
    assert not list((tmp_path / "run").glob(".checkpoint*"))


def test_an_error_of_all_is_told_once(two: Ranks, tmp_path: Path) -> None:
    options = [*SHORT, f"directory={tmp_path}/run"]
    assert "train.epochs=-1.0 must be positive" in told_once(two(command, [*options, "train.epochs=-1"]))
    assert "of which there are 2" in told_once(two(command, [*options, "train.batch_size=1"]))
    assert "leave one of the two out" in told_once(two(command, ["-m", *options, "seed=0,1"]))
    (tmp_path / "run" / record.FILE).write_text("{}")
    assert "holds a run already" in told_once(two(command, options))
    assert "a study runs many models" in told_once(two(command, ["experiment=short/drift"]))


def test_processes_share_a_directory_and_the_first_tells(two: Ranks, tmp_path: Path) -> None:
    """Hydra resolves the time in each process by itself."""
    options = [*SHORT, "optimizer=adam", f"directory='{tmp_path}/it''s/${{now:%H-%M-%S-%f}}'".replace("''", r"\'")]
    (code, out, _), (other, silence, _) = two(command, options)
    assert (code, other) == (0, 0) and "training loss" in out and silence == ""
    (directory,) = (tmp_path / "it's").iterdir()
    assert {".hydra", record.FILE, history.FILE, checkpoint.FILE} <= {path.name for path in directory.iterdir()}


def test_another_process_takes_the_directory_of_the_first(tmp_path: Path) -> None:
    store, directory = dist.HashStore(), tmp_path / "a b, it's = [c]"
    Process(0, 2, store).share_directory(directory)
    assert Process(0, 2, store).overrides() == [] == ALONE.overrides()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        overrides = ["directory=else", "hydra.run.dir=where", *Process(1, 2, store).overrides()]
        hydra = compose("config", overrides=overrides, return_hydra_config=True).hydra
    assert hydra.run.dir == str(directory) and hydra.output_subdir is None


def failing(process: Process, error: Exception) -> None:
    with mock.patch.object(distributed, "PATIENCE", timedelta(seconds=0.5)), process.one_message():
        raise error


def own(process: Process) -> None:
    if process.rank == 1:
        failing(process, UserError("no such file"))


def test_an_error_of_one_is_told_by_it(two: Ranks) -> None:
    nothing, error = two(own)
    assert nothing is None and isinstance(error, UserError) and str(error) == "process 1 of 2: no such file"


def test_a_lost_process_is_told_once(two: Ranks) -> None:
    found = two(failing, RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer."))
    assert sorted(type(error).__name__ for error in found) == ["SystemExit", "UserError"]
    assert any("one of the processes is gone" in str(error) for error in found)
    assert [type(error) for error in two(failing, RuntimeError("a bug"))] == [RuntimeError] * 2
    assert [type(error) for error in two(failing, KeyboardInterrupt())] == [KeyboardInterrupt, SystemExit]


def decided(process: Process, found: str | Exception) -> tuple[int, Any]:
    acted = []

    def act(words: str | Exception) -> str:
        acted.append(words)
        if isinstance(words, Exception):
            raise words
        return f"{words} of {process.rank}"

    try:
        return len(acted), process.decide(act, found) + f", {len(acted)}"
    except UserError as error:
        return len(acted), str(error)


def test_what_the_first_decides_is_everybodys(two: Ranks) -> None:
    assert two(decided, "word") == [(0, "word of 0, 1"), (0, "word of 0, 0")]
    assert two(decided, UserError("no")) == [(1, "no"), (0, "no")]
    disk = OSError(errno.ENOSPC, "full")
    assert all("full: make room" in told for _, told in two(decided, disk))


def fetched(process: Process, cache: Path) -> tuple[int, bool]:
    def fetch() -> bool:
        if found := cache.exists():
            return found
        time.sleep(0.3)
        cache.write_text("data")
        return found

    return process.rank, process.in_turn(fetch)


def test_what_the_first_fetches_the_others_find(two: Ranks, tmp_path: Path) -> None:
    assert two(fetched, tmp_path / "cache") == [(0, False), (1, True)]


@pytest.mark.parametrize("batch_size", [16, 15, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_rows_cover_a_batch_and_weigh_as_much_as_there_are(world_size: int, batch_size: int) -> None:
    processes = [Process(rank, world_size) for rank in range(world_size)]
    rows = [index for process in processes for index in range(batch_size)[process.rows(batch_size)]]
    assert rows == list(range(batch_size))
    losses = torch.rand(batch_size, dtype=torch.float64)
    parts = [process.weight(batch_size) * losses[process.rows(batch_size)].mean() for process in processes]
    torch.testing.assert_close(torch.stack(parts).mean(), losses.mean())
    sizes = {len(losses[process.rows(batch_size)]) for process in processes}
    assert max(sizes) - min(sizes) <= 1


def test_a_batch_has_an_example_for_every_process() -> None:
    with pytest.raises(UserError, match="train.batch_size=3 .* of which there are 4"):
        Sampler(100, 3, 0, CPU, Process(1, 4))


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """As torchrun sets it for the second of two processes, at an attempt of so many."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    variables = {"RANK": 1, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
    variables |= {"TORCHELASTIC_USE_AGENT_STORE": True}

    def attempt(number: int) -> None:
        this_process.cache_clear()
        for name, value in (variables | {"TORCHELASTIC_RESTART_COUNT": number}).items():
            monkeypatch.setenv(name, str(value))

    yield attempt
    this_process.cache_clear()


def test_a_process_is_as_the_launcher_says(environment: Callable[[int], None]) -> None:
    assert this_process() is ALONE
    environment(0)
    process = this_process()
    assert (process.rank, process.world_size, process.first) == (1, 2, False) and this_process() is process
    with pytest.raises(UserError, match="a search runs many models"):
        refuse_processes("a search")


def test_what_was_told_is_not_tried_again(environment: Callable[[int], None]) -> None:
    """torchrun starts again whatever failed; a process that was killed has told nothing."""
    environment(0)
    this_process()
    environment(1)
    process = this_process()
    process.store.set(distributed.TOLD, "")
    for attempt in (2, 3):
        environment(attempt)
        with pytest.raises(SystemExit, match="2"):
            this_process()


def test_a_restart_needs_a_directory(launch: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    outcome = launch()
    assert outcome.code == 2 and "--max-restarts" in outcome.err and "resume=true directory=PATH" in outcome.err
    assert launch("optimizer=adam", "resume=true", "directory=run").code == 0


def test_more_processes_than_gpus_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="2 processes have 1 GPUs: start 1 of them, or use device=cpu"):
        Process(0, 2).gpu()


def torchrun(*arguments: str, directory: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=directory, env=environment, timeout=300)


@pytest.mark.slow
def test_torchrun_trains_into_one_directory(tmp_path: Path) -> None:
    ended = torchrun("-m", "experiments.train", *SHORT, "optimizer=adam", "name=both", directory=tmp_path)
    assert ended.returncode == 0, ended.stderr
    (directory,) = (tmp_path / "outputs" / "both").iterdir()
    assert ended.stdout.count("training loss") == 1 and f"written to {directory}" in ended.stdout
    alone = train(compose_config([*SHORT, "optimizer=adam"]), tmp_path / "alone")
    assert Record.load(directory / record.FILE).train_loss == pytest.approx(alone.train_loss, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("restarts", [0, 2])
@pytest.mark.parametrize(
    ("override", "message"),
    [("train.epoch=3", "Key 'epoch' not in 'TrainConfig'"), ("optimizer.lr=1e30", "not finite at step 2")],
    ids=["composition", "divergence"],
)
def test_torchrun_has_one_message(override: str, message: str, restarts: int, tmp_path: Path) -> None:
    """torchrun itself tells more: which processes ended, and how."""
    run = ["-m", "experiments.train", *SHORT, "optimizer=sgd_linear", "resume=true", f"directory={tmp_path}/run"]
    ended = torchrun("--max-restarts", str(restarts), *run, override, directory=tmp_path)
    assert ended.returncode == 1
    told = [line for line in ended.stderr.splitlines() if message in line]
    # Hydra's own messages are told again with every start; those of this project are not.
    assert len(told) == (1 + restarts if override == "train.epoch=3" else 1), ended.stderr
    assert "/experiments/" not in ended.stderr, "a traceback"
