"""Searches over a run that takes no time, and a short one over real runs; killed, and continued as if never killed."""

from __future__ import annotations

import copy
import functools
import json
import math
import shlex
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest import mock

import pytest
from optuna import load_study
from sqlalchemy import Engine, event

from experiments import record, search
from experiments.config import compose_config
from experiments.errors import Diverged, UserError
from experiments.fingerprint import fingerprint
from experiments.progress import Notify
from experiments.record import Record
from experiments.schedule import evaluation_counts
from experiments.schemas.run import Config
from experiments.search import run_search
from experiments.search_results import Trial, finding, ranked, read
from experiments.trials import FILE, alone, compose_overrides
from tests.experiments.conftest import SHORT, Outcome
from tests.experiments.test_tracker import history, inspect

WARM_UPS = "+search.space={train.warmup_examples: {choices: [256, 1536]}}"
SPACE = "+search.space={train.warmup_examples: {choices: [0, 256]}}"
SMALL = [*SHORT, "search=learning_rate", "search.startup=3", SPACE]
BEST_LR = 0.02


class Killed(BaseException):
    """Stands for kill -9 at a known moment."""


class Trainer:
    """In the place of train(): loss |ln(lr / 0.02)| + 0.1 at the end, and above lr 0.5 a run that diverges."""

    def __init__(self, kill_at: int | None = None) -> None:
        self.runs: list[str] = []
        self.kill_at = kill_at

    def __call__(self, config: Config, directory: Path, notify: Notify) -> Record:
        if len(self.runs) == self.kill_at:
            raise Killed
        self.runs.append(directory.name)
        final = abs(math.log(config.optimizer.lr / BEST_LR)) + 0.1 + config.seed / 100
        counts = evaluation_counts(2816, 256, config.evaluation.count)
        losses = [10 - (10 - final) * count / 2816 for count in counts]
        result = Record(config.optimizer.name, "", config.optimizer.lr, 16, config.seed, fingerprint(config))
        directory.mkdir(parents=True, exist_ok=True)
        if config.optimizer.lr > 0.5:
            result.status, result.examples, result.train_loss, result.test_loss = "diverged", [0], [10], [10]
            result.save(directory / record.FILE)
            raise Diverged(1, [0], None)
        for count, loss in zip(counts, losses, strict=True):
            notify(count, 2816, loss)
        result.status, result.examples = "finished", counts
        result.train_loss, result.test_loss = losses, [loss + 1 for loss in losses]
        result.save(directory / record.FILE)
        return result


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """SQLite does not wait for the disk, and a trial's overrides are set rather than composed."""

    def unsafe(connection: sqlite3.Connection, record: object) -> None:
        connection.execute("PRAGMA synchronous = OFF")

    @functools.cache
    def composed(overrides: tuple[str, ...]) -> Config:
        return compose_config(overrides)

    def assign(overrides: Sequence[str]) -> Config:
        config = copy.deepcopy(composed(tuple(overrides[:-2])))
        lr, warm_up = (override.partition("=")[2] for override in overrides[-2:])
        config.optimizer.lr, config.train.warmup_examples = float(lr), int(warm_up)
        return config

    event.listen(Engine, "connect", unsafe)
    with mock.patch.object(search, "compose_overrides", assign):
        yield
    event.remove(Engine, "connect", unsafe)


def searched(directory: Path, *overrides: str, trainer: Trainer | None = None) -> list[Trial]:
    """The trials of a search in a directory, after running it with a trainer, without results."""
    given = [*SMALL, *overrides]
    with mock.patch.multiple(search, train=trainer or Trainer(), finish=mock.Mock(), confirm=lambda *search: None):
        run_search(compose_config(given), directory, given)
    return trials_in(directory)


def trials_in(directory: Path) -> list[Trial]:
    return read(load_study(study_name="search", storage=f"sqlite:///{directory / FILE}"))


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> list[Trial]:
    return searched(tmp_path_factory.mktemp("search"), "search.trials=20", WARM_UPS)


def distance(trial: Trial) -> float:
    lr = trial.values["optimizer.lr"]
    assert isinstance(lr, float)
    return abs(math.log(lr / BEST_LR))


def of(state: str, trials: list[Trial]) -> list[Trial]:
    return [trial for trial in trials if trial.state == state]


def test_what_is_not_in_the_space_is_not_compared_with(tmp_path: Path) -> None:
    outside = "+search.space={optimizer.lr: {low: 0.1, high: 0.2}}"
    trials = searched(tmp_path, "search.trials=3", "optimizer.lr=0.008", outside)
    assert not any(trial.given for trial in trials)
    settings = compose_config([*SMALL, outside]).search
    assert settings is not None
    found = finding(trials, settings, None)
    assert found.verdict == "cannot be judged" and "What it began with is not in the space" in found.sentence


def test_it_finds_the_best_learning_rate_and_starts_from_what_is_given(trials: list[Trial]) -> None:
    assert trials[0].values == {"optimizer.lr": 0.008, "train.warmup_examples": "256"}
    assert [trial.number for trial in trials] == list(range(20))
    assert all(float(f"{trial.values['optimizer.lr']:.4g}") == trial.values["optimizer.lr"] for trial in trials)
    finished = of("finished", trials)
    best = min(finished, key=lambda trial: trial.loss)
    assert distance(best) < 0.25 < distance(trials[0])
    assert best.loss == pytest.approx(distance(best) + 0.1)
    assert all(trial.examples == 2816 for trial in finished)


def test_hopeless_trials_are_broken_off_and_good_ones_are_not(trials: list[Trial]) -> None:
    """Neither before a fifth of the budget, nor before the end of a long warm-up."""
    pruned = of("pruned", trials)
    assert min(map(distance, pruned)) > max(sorted(map(distance, of("finished", trials)[3:]))[:3])
    earliest = {
        warm_up: min(t.examples for t in pruned if t.values["train.warmup_examples"] == warm_up)
        for warm_up in ("256", "1536")
    }
    assert 563 <= earliest["256"] < 1536 <= earliest["1536"] < 2816


def test_the_test_loss_is_searched_without_pruning(tmp_path: Path, trials: list[Trial]) -> None:
    found = searched(tmp_path, "search.trials=6", "search.loss=test", WARM_UPS)
    assert not of("pruned", found)
    assert found[0].loss == pytest.approx(trials[0].loss + 1)


def test_of_several_seeds_the_mean_counts(tmp_path: Path) -> None:
    trainer = Trainer()
    trials = searched(tmp_path, "search.trials=1", "search.seeds=[0,4]", trainer=trainer)
    one, two = trials[0].losses
    assert two - one == pytest.approx(0.04) and trials[0].loss == pytest.approx((one + two) / 2)
    assert trials[0].examples == 2 * 2816
    assert load_study(study_name="search", storage=f"sqlite:///{tmp_path / FILE}").best_value == trials[0].loss
    assert [name.rpartition("-")[0].rpartition("-")[2] for name in trainer.runs] == ["seed0", "seed4"]


def test_the_best_is_confirmed_on_seeds_that_chose_nothing(tmp_path: Path) -> None:
    """Once: a second time the runs are found."""
    trainer = Trainer()
    given = [*SMALL, "search.trials=3", "optimizer.lr=0.002"]
    for _ in range(2):
        with mock.patch.multiple(search, train=trainer, finish=(finish := mock.Mock())):
            run_search(compose_config(given), tmp_path, given)
    trials, found, *_ = finish.call_args.args
    best = ranked(trials)[0]
    seeds = [name.rpartition("-")[0].rpartition("-seed")[2] for name in trainer.runs[-10:]]
    assert seeds == 2 * ["10", "11", "12", "13", "14"] and len(trainer.runs) <= 3 + 10
    means = [distance(trial) + 0.1 + 0.12 for trial in (best, trials[0])]
    assert f"it has {means[0]:.4g}, and the first trial {means[1]:.4g}" in found.findings[0].sentence
    assert found.findings[0].verdict == "holds"


def test_a_diverged_trial_counts_as_its_initial_model(tmp_path: Path) -> None:
    trials = searched(tmp_path, "search.trials=3", "optimizer.lr=0.6")
    assert (trials[0].state, trials[0].loss) == ("diverged", 10)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[Trial]:
    return searched(tmp_path_factory.mktemp("whole"), "search.trials=8")


def test_a_killed_search_goes_on_as_if_it_had_not_been(whole: list[Trial], tmp_path: Path) -> None:
    for kill_at in (0, 1, 4):  # runs of each start
        with pytest.raises(Killed):
            searched(tmp_path, "search.trials=8", trainer=Trainer(kill_at))
    trainer = Trainer()
    assert searched(tmp_path, "search.trials=8", trainer=trainer) == whole
    assert len(trainer.runs) == 8 - 0 - 1 - 4
    assert searched(tmp_path, "search.trials=8", trainer=Trainer(kill_at=0)) == whole  # nothing is left to do


def test_more_trials_continue_a_search(whole: list[Trial], tmp_path: Path) -> None:
    assert searched(tmp_path, "search.trials=5") == whole[:5]
    assert searched(tmp_path, "search.trials=8") == whole


def test_another_seed_draws_others(whole: list[Trial], tmp_path: Path) -> None:
    other = searched(tmp_path, "search.trials=2", "search.sampler_seed=1")
    assert other[0] == whole[0] and other[1].values != whole[1].values


def test_finished_runs_are_recognised(tmp_path: Path) -> None:
    """When the file of trials is lost, or another sampler comes by again."""
    whole = searched(tmp_path, "search.trials=4")
    (tmp_path / FILE).unlink()
    trainer = Trainer()
    again = searched(tmp_path, "search.trials=4", trainer=trainer)
    finished = [trial for trial in whole if trial.state != "pruned"]
    assert len(trainer.runs) == 4 - len(finished) and again[:3] == whole[:3]


def test_a_refused_combination_is_not_tried_again_and_stops_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space = "+search.space={train.decay: {choices: [none, exponential]}, engine: {choices: [fused, vmap]}}"
    with mock.patch.object(search, "compose_overrides", compose_overrides):
        trials = searched(tmp_path, "engine=fused", space, "search.trials=8")
    states = {(trial.values["train.decay"], trial.state == "refused") for trial in trials}
    assert states == {("none", False), ("exponential", True)} and len(trials) == 8
    choices = ("train.warmup_examples", "train.decay", "engine")  # lr is from a range
    refused = [tuple(trial.values[key] for key in choices) for trial in trials if trial.state == "refused"]
    assert len(set(refused)) == len(refused)
    assert capsys.readouterr().out.count("is refused") == len(refused)


class Refusing(Trainer):
    def __call__(self, config: Config, directory: Path, notify: Notify) -> Record:
        if config.train.warmup_examples == 0:
            raise UserError("no run without a warm-up")
        return super().__call__(config, directory, notify)


def test_a_search_with_refusals_goes_on_as_if_it_had_not_been_stopped(tmp_path: Path) -> None:
    whole = searched(tmp_path / "whole", "search.trials=8", trainer=Refusing())
    assert [trial.values["train.warmup_examples"] for trial in whole].count("0") == 1 == len(of("refused", whole))
    assert len(whole) == 8
    for trials in (5, 8):
        found = searched(tmp_path / "parts", f"search.trials={trials}", trainer=Refusing())
        assert found == whole[:trials]


def test_nothing_but_refusals_is_an_error(tmp_path: Path) -> None:
    given = [*SMALL, "+search.space={model.groups: {choices: [3]}}", "model=convnet", "search.trials=3"]
    with (
        mock.patch.object(search, "compose_overrides", compose_overrides),
        pytest.raises(UserError, match=r"none of 3 trials .* model.groups=3 does not divide 16"),
    ):
        run_search(compose_config(given), tmp_path, given)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["search.trials=0"], "search.trials=0 .* must be positive"),
        (["search.seeds=[1,1]"], r"search.seeds: \[1, 1\]"),
        (["search.confirm_seeds=[1]"], "search.confirm_seeds: .* two or more"),
        (["search.confirm_seeds=[0,1]"], "none of search.seeds"),
        (["search.prune_after=2"], "search.prune_after=2.0 is a share"),
        (["+search.space={seed: {}}"], "seed needs either low and high, or choices"),
        (["+search.space={seed: {low: 1, high: 2, choices: [1]}}"], "seed needs either"),
        (["+search.space={seed: {choices: []}}"], "choices of seed: .* one value or more"),
        (["+search.space={seed: {choices: [1, 1]}}"], "each of them once"),
        (["+search.space={train.epochs: {low: 2, high: 1}}"], "train.epochs from 2.0 to 1.0 is no range"),
        (["+search.space={train.epochs: {low: 0, high: 1, log: true}}"], "is no range for log"),
        (["+search.space={train.epoch: {low: 1, high: 2}}"], "train.epoch is no key of this configuration"),
    ],
)
def test_a_wrong_search_is_a_user_error(overrides: list[str], message: str, tmp_path: Path) -> None:
    given = [*SMALL, *overrides]
    with pytest.raises(UserError, match=message):
        run_search(compose_config(given), tmp_path, given)


def test_a_directory_holds_one_search(tmp_path: Path) -> None:
    searched(tmp_path, "search.trials=1")
    with pytest.raises(UserError, match="another search: train.epochs was 2.0 and is now 3.0"):
        searched(tmp_path, "search.trials=1", "train.epochs=3")
    with pytest.raises(UserError, match="another search: search.startup was 3 and is now 4"):
        searched(tmp_path, "search.trials=1", "search.startup=4")
    with alone(tmp_path), pytest.raises(UserError, match=f"another search runs in {tmp_path}"):
        searched(tmp_path, "search.trials=1")
    (tmp_path / FILE).write_bytes(b"no database" * 1000)
    with pytest.raises(UserError, match=r"search.db holds no search that can be read .*move it away"):
        searched(tmp_path, "search.trials=1")


def test_an_interrupted_search_says_how_to_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Interrupted(Trainer):
        def __call__(self, config: Config, directory: Path, notify: Notify) -> Record:
            if len(self.runs) == 2:
                raise KeyboardInterrupt
            return super().__call__(config, directory, notify)

    with pytest.raises(SystemExit) as end:
        searched(tmp_path, "search.trials=4", trainer=Interrupted())
    assert end.value.code == 130
    assert "interrupted: 2 trials are kept" in capsys.readouterr().out
    assert len(searched(tmp_path, "search.trials=4")) == 4


def test_a_short_search_of_real_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launch: Callable[..., Outcome], capsys: pytest.CaptureFixture[str]
) -> None:
    """As typed: its best command trains again what it found, and W&B has a run a trial and one of the whole."""
    monkeypatch.setattr(search, "compose_overrides", compose_overrides)
    shape = ["tracker=wandb", "model.widths=[8]", "train.epochs=0.5", "optimizer=adam"]
    typed = ["search=learning_rate", "search.trials=2", f"directory={tmp_path}", SPACE]
    monkeypatch.setattr(sys, "argv", ["experiments.search", *SHORT, *shape, *typed])
    search.main()
    out = capsys.readouterr().out
    trials = trials_in(tmp_path)
    best = ranked(trials)[0]
    assert "2 trials in" in out and "- The search finds a lower training loss than" in out
    assert (tmp_path / "figure.png").stat().st_size > 1000 and (tmp_path / "figure.svg").exists()

    (command,) = (line for line in out.splitlines() if "python -m experiments.train" in line)
    words = shlex.split(command[command.index("python") :])
    assert words[:3] == ["python", "-m", "experiments.train"]
    assert launch(*words[3:]).code == 0
    again = Record.load(tmp_path / "best" / record.FILE)
    assert again.train_loss[-1] == best.losses[0] and again.lr == best.values["optimizer.lr"]

    confirming = 0 if best is trials[0] else 2 * 5
    assert len(list(tmp_path.glob("runs/*/wandb/offline-run-*"))) == 2 + confirming
    (summary,) = tmp_path.glob("wandb/offline-run-*")
    told = json.loads(inspect(summary, "--summary"))
    assert told["summary"]["search/best"] == best.loss and told["summary"]["search/trials"] == 2
    assert told["summary"]["Trials"]["nrows"] == 2 and told["summary"]["Figure"]["_type"] == "image-file"
    assert told["summary"]["Findings"]["nrows"] == 1
    lines = [line for line in history(summary) if "search/loss" in line]
    assert [line["search/trial"] for line in lines] == [0, 1]
    assert lines[-1]["examples_seen"] == sum(trial.examples for trial in trials)


def test_a_search_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["experiments.search", "experiment=digits"])
    with pytest.raises(SystemExit) as end:
        search.main()
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: search=null: choose a space, as search=learning_rate")


def started(directory: Path) -> subprocess.Popen[str]:
    overrides = [*SMALL, "search.trials=6", f"directory={directory}", "train.epochs=1"]
    command = [sys.executable, "-m", "experiments.search", *overrides]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_after_kill_9_no_trial_is_lost_and_none_repeated(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = started(whole)
    out, _ = process.communicate()
    assert process.returncode == 0, out
    for trials in (1, 3):
        process = started(killed)
        while over(killed) < trials and process.poll() is None:
            time.sleep(0.01)
        time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert over(killed) < 6, "the search ended before it could be killed"
    process = started(killed)
    out, _ = process.communicate()
    assert process.returncode == 0, out
    assert f"6 trials in {killed}, " in out and " 0 of them" not in out
    assert trials_in(killed) == trials_in(whole)


def over(directory: Path) -> int:
    if not (directory / FILE).exists():
        return 0
    try:
        with sqlite3.connect(f"file:{directory / FILE}?mode=ro", uri=True) as database:
            return int(
                database.execute("select count(*) from trials where state in ('COMPLETE', 'PRUNED')").fetchone()[0]
            )
    except sqlite3.OperationalError:  # its tables are being made
        return 0
