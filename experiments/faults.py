"""What a run loses when its processes are killed: nothing. Kills one after another with kill -9, and compares.

python -m experiments.faults                                 20 kills among two processes; some minutes
python -m experiments.faults --kills 3 optimizer=adam        a shorter run; with overrides of experiments.train

The same run is made twice under torchrun, once undisturbed. Of the other one a process is killed at a moment that is
drawn after each first step, be it in a step, in an evaluation, or while a checkpoint is written; torchrun's elastic
restart then starts all of them again. At the end everything must be equal to the last bit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch

from experiments import checkpoint, history, record
from experiments.atomic import atomic_write
from experiments.benchmarks.machine import machine
from experiments.errors import UserError, command_line
from experiments.record import Record
from experiments.witness import Attempt, witnessed

LATEST = 4.0  # seconds after the first step at which a process is killed: some checkpoints, or none
POLL = 0.02  # seconds
PATIENCE = 120.0  # seconds, for processes to start
# Small steps and many checkpoints: a kill finds any part of the loop.
RUN = (
    "experiment=digits",
    "tracker=none",
    "train.batch_size=4",
    "train.checkpoint_every_examples=512",
    "train.log_every_examples=512",
)


def disturbed_run(kills: int) -> tuple[str, ...]:
    """The overrides of a run that is long enough for kills at LATEST / 2 each."""
    return (*RUN, f"train.epochs={max(24, 4 * kills)}")


@dataclass(frozen=True)
class Kill:
    """seen: examples of its last step; resumed: examples at which the next attempt went on."""

    process: int
    seen: int
    resumed: int


@dataclass(frozen=True)
class Run:
    """A folder: the run's directory in it, and what its processes wrote down."""

    folder: Path
    processes: int

    @property
    def directory(self) -> Path:
        return self.folder / "run"

    @property
    def witnesses(self) -> Path:
        return self.folder / "witnesses"

    def attempt(self, number: int) -> list[Attempt]:
        """By process."""
        return [witnessed(self.witnesses, number, rank) for rank in range(self.processes)]

    @contextmanager
    def started(self, restarts: int, overrides: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
        """What torchrun and the processes print goes into a file of the folder."""
        if self.folder.exists():
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(self.processes), "--max-restarts", str(restarts)]
        command += ["-m", "experiments.witness", str(self.witnesses), *overrides]
        command += [f"directory={self.directory}", "resume=true"]
        with (
            (self.folder / "output.txt").open("w") as output,
            subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True) as torchrun,
        ):
            try:
                yield torchrun
            finally:
                if torchrun.poll() is None:
                    torchrun.terminate()

    def finish(self, torchrun: subprocess.Popen[bytes]) -> None:
        if torchrun.wait() != 0:
            raise UserError(f"the run failed: {self.folder / 'output.txt'} says why")


def disturb(run: Run, torchrun: subprocess.Popen[bytes], kills: int, draw: random.Random) -> list[int]:
    """Kills a process of each of the first attempts; their ranks."""
    killed = []
    for number in range(kills):
        deadline = time.monotonic() + PATIENCE
        while not all(process.steps for process in run.attempt(number)):
            if torchrun.poll() is not None:
                raise UserError(f"the run ended after {number} kills of {kills}: lengthen it with train.epochs=")
            if time.monotonic() > deadline:
                raise UserError(f"no process has started within {PATIENCE:g} s: {run.folder / 'output.txt'}")
            time.sleep(POLL)
        time.sleep(draw.uniform(0, LATEST))
        rank = draw.randrange(run.processes)
        if torchrun.poll() is None:
            os.kill(run.attempt(number)[rank].pid, signal.SIGKILL)
            killed.append(rank)
            print(f"killed process {rank}, {len(killed)} of {kills}", flush=True)
    return killed


def steps(run: Run, attempt: int) -> dict[int, list[int]]:
    """What the processes together were given for each step of an attempt, by the examples seen after it."""
    processes = [process.steps for process in run.attempt(attempt)]
    # A kill may come when some processes have been given a step and others have not.
    counts = sorted(set.intersection(*map(set, processes)))
    return {seen: [index for process in processes for index in process[seen]] for seen in counts}


def trajectory(run: Run, attempts: int) -> dict[int, list[int]]:
    """The examples of every step that the parameters at the end come from, by the examples seen after it.

    Raises UserError where an attempt does not go on from what the one before it had seen.
    """
    kept: dict[int, list[int]] = {}
    for number in range(attempts):
        begin = beginning(found := steps(run, number))
        if begin != 0 and begin not in kept:
            raise UserError(f"attempt {number} began at {begin} examples, where the one before it had not been")
        kept = {seen: indices for seen, indices in kept.items() if seen <= begin} | found
    return kept


def beginning(steps: dict[int, list[int]]) -> int:
    """Examples seen before the first step."""
    seen, indices = next(iter(steps.items()))
    return seen - len(indices)


def final(run: Run) -> dict[str, Any]:
    """All that must be the same: nothing of it depends on the clock."""
    state = checkpoint.load(run.directory / checkpoint.FILE, torch.device("cpu"))
    return {
        "metrics": asdict(replace(Record.load(run.directory / record.FILE), seconds=0.0, processor_seconds=0.0)),
        "parameters": {name: value.numpy().tobytes() for name, value in state["model"].items()},
        "history": [
            {key: value for key, value in line.items() if not key.startswith("speed/")}
            for line in history.load(run.directory)
        ],
    }


def examine(output: Path, kills: int, processes: int, seed: int, overrides: Sequence[str]) -> dict[str, Any]:
    """Both runs; each kill, and for each part of the results whether it is the same."""
    whole, disturbed = (Run(output / name, processes) for name in ("undisturbed", "killed"))
    print(f"a run that is left alone: {whole.folder}", flush=True)
    with whole.started(0, overrides) as torchrun:
        whole.finish(torchrun)
    print(f"a run that is killed: {disturbed.folder}", flush=True)
    with disturbed.started(kills, overrides) as torchrun:
        ranks = disturb(disturbed, torchrun, kills, random.Random(seed))
        disturbed.finish(torchrun)
    found = []
    for number, rank in enumerate(ranks):
        found.append(Kill(rank, max(disturbed.attempt(number)[rank].steps), beginning(steps(disturbed, number + 1))))
    expected, ended = final(whole), final(disturbed)
    same = {name: value == expected[name] for name, value in ended.items()}
    same["examples"] = trajectory(disturbed, len(ranks) + 1) == trajectory(whole, 1)
    reached = {key: values[-1] for key, values in expected["metrics"].items() if isinstance(values, list)}
    return {"kills": [asdict(kill) for kill in found], "same": same, "final": reached}


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="of experiments.train")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the moments and of who is killed")
    parser.add_argument("--output", type=Path, default=Path("outputs/faults"))
    return parser


def main() -> None:
    arguments = parser().parse_args()
    # torchrun is ended on the way out, and not left behind by one who ends this.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    overrides = [*disturbed_run(arguments.kills), *arguments.overrides]
    with command_line():
        found = examine(arguments.output.absolute(), arguments.kills, arguments.processes, arguments.seed, overrides)
        about = {"date": date.today().isoformat(), "machine": machine(threads=1), "processes": arguments.processes}
        about |= {"overrides": overrides}
        path = arguments.output / "faults.json"
        with atomic_write(path) as file:
            file.write((json.dumps(about | found, indent=1) + "\n").encode())
        for kill in found["kills"]:
            print("process {process} killed at {seen} examples, resumed at {resumed}".format(**kill))
        for name, same in found["same"].items():
            print(f"{name}: {'the same, bit for bit' if same else 'NOT the same'}")
        print(f"written: {path}")
        if len(found["kills"]) < arguments.kills or not all(found["same"].values()):
            raise UserError("a run that is killed must end as one that is not")


if __name__ == "__main__":
    main()
