"""Launchers compose; and a sweep runs through submitit, on this machine and on a cluster made of three scripts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from experiments import record
from experiments.config import CONF
from experiments.record import Record

SWEEP = ["tracker=none", "optimizer=adam", "train.epochs=0.5", "train.warmup_examples=0", "seed=0,1", "resume=true"]

# What submitit calls of Slurm. sbatch begins the jobs of the array at once; sacct tells which of them have a result.
SBATCH = """#!{python}
import os, pathlib, re, subprocess, sys
script = pathlib.Path(sys.argv[-1])
first, last = map(int, re.search(r"--array=(\\d+)-(\\d+)", script.read_text()).groups())
tasks = re.search(r"--ntasks-per-node=(\\d+)", script.read_text()).group(1)
for task in range(first, last + 1):
    slurm = {{"SLURM_JOB_ID": f"7{{task}}", "SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": str(task)}}
    slurm |= {{"SLURM_NTASKS": tasks, "SLURM_JOB_NUM_NODES": "1", "SLURM_NNODES": "1", "SLURM_NODEID": "0"}}
    slurm |= {{"SLURM_JOB_NODELIST": "localhost", "SLURM_JOBID": f"7{{task}}"}}
    null = subprocess.DEVNULL
    subprocess.Popen(["bash", str(script)], env=os.environ | slurm, stdout=null, stderr=null, start_new_session=True)
print("Submitted batch job 77")
"""
SRUN = """#!{python}
import os, subprocess, sys
start = next(i for i, word in enumerate(sys.argv) if word == {python!r})
tasks = range(int(os.environ["SLURM_NTASKS"]))
ids = [os.environ | {{"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)}} for task in tasks]
logs = [open(f"{sweep}/{{os.environ['SLURM_JOB_ID']}}-{{task}}.log", "w") for task in tasks]
started = [subprocess.Popen(sys.argv[start:], env=own, stdout=log) for own, log in zip(ids, logs)]
sys.exit(max(task.wait() for task in started))
"""
SACCT = """#!{python}
import pathlib
print("JobID|State|NodeList")
for task in range(2):
    done = list(pathlib.Path({sweep!r}).glob(f".submitit/*/77_{{task}}_0_result.pkl"))
    print(f"77_{{task}}|{{'COMPLETED' if done else 'RUNNING'}}|here")
"""


def launcher(*overrides: str) -> Any:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("config", overrides=list(overrides), return_hydra_config=True)
    return OmegaConf.to_container(composed.hydra.launcher, resolve=False)


def test_launchers_compose() -> None:
    theirs = launcher("hydra/launcher=submitit_slurm", "hydra.launcher.partition=gpu", "hydra.launcher.gpus_per_node=1")
    assert theirs["_target_"].endswith("SlurmLauncher") and (theirs["partition"], theirs["gpus_per_node"]) == ("gpu", 1)
    ours = launcher("hydra/launcher=slurm", "hydra.launcher.partition=gpu")
    assert set(ours) == set(theirs) and ours["_target_"] == theirs["_target_"] and ours["partition"] == "gpu"
    assert ours["max_num_timeout"] > 0 == theirs["max_num_timeout"]
    shared = launcher(
        "hydra/launcher=slurm", *(f"hydra.launcher.{key}=4" for key in ("tasks_per_node", "gpus_per_node"))
    )
    assert (shared["tasks_per_node"], shared["gpus_per_node"], shared["nodes"]) == (4, 4, 1)
    assert launcher("hydra/launcher=joblib")["_target_"].endswith("JoblibLauncher")


def sweep(directory: Path, *overrides: str, path: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "experiments.train", "-m", *SWEEP, f"directory={directory}", *overrides]
    environment = os.environ | {"PATH": f"{path}{os.pathsep}{os.environ['PATH']}"}
    root = Path(__file__).resolve().parents[2]
    return subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment, timeout=300)


def finished(directory: Path) -> bool:
    return all(Record.load(directory / job / record.FILE).status == "finished" for job in ("0", "1"))


@pytest.mark.slow
def test_a_sweep_runs_through_submitit_on_this_machine(tmp_path: Path) -> None:
    ended = sweep(tmp_path, "hydra/launcher=submitit_local")
    assert ended.returncode == 0, ended.stderr
    assert finished(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("tasks", [1, 2])
def test_a_sweep_runs_as_an_array_of_slurm_jobs(tasks: int, tmp_path: Path) -> None:
    directory, commands = tmp_path / "sweep", tmp_path / "bin"
    commands.mkdir()
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("sacct", SACCT)):
        (commands / name).write_text(text.format(python=sys.executable, sweep=str(directory)))
        (commands / name).chmod(0o755)
    options = ["hydra/launcher=slurm", "hydra.launcher.partition=long", f"hydra.launcher.tasks_per_node={tasks}"]
    ended = sweep(directory, *options, path=str(commands))
    assert ended.returncode == 0, ended.stderr
    assert finished(directory)
    told = {path.stem: "training loss" in path.read_text() for path in directory.glob("*.log")}
    assert told == {f"7{job}-{task}": task == 0 for job in range(2) for task in range(tasks)}
    script = (directory / ".submitit/77/77_submission.sh").read_text()
    assert "export SLURM_KILL_BAD_EXIT=1" in script
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", script, flags=re.MULTILINE))
    assert (asked["partition"], asked["array"], asked["mem"]) == ("long", "0-1%2", "8GB")
    assert (asked["cpus-per-task"], asked["time"]) == ("2", "240") and "gpus-per-node" not in asked
    assert asked["ntasks-per-node"] == str(tasks)
