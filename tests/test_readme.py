"""Every block and command of the README runs."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
COMMANDS = [line.partition(" #")[0].strip() for kind, block in BLOCKS if kind == "bash" for line in block.splitlines()]

# Run elsewhere, or not runnable without what a test must not have.
ELSEWHERE = {
    "source .venv/bin/activate": "of the shell that types it; the clone test makes that environment",
    "make demo": "test_make_demo_in_an_empty_clone",
    "make test": "is what runs the tests",
    "python -m experiments.train experiment=demo": "what make demo runs",
    "wandb leet outputs/mine/wandb": "fills a terminal until it is left: its headless form is below",
    "wandb sync outputs/mine/wandb/offline-run-*": "needs an account",
}
# Appended to a command that would take too long as it stands.
SHORTENED = {
    "python -m experiments.train experiment=batch_size_invariance": [
        "train.epochs=1",
        "train.warmup_examples=256",
        "evaluation.count=4",
        "study.batch_sizes=[16,64,256]",
        "study.score_batch_sizes=[16,64]",
        "study.lr_multipliers=[1]",
        "study.seeds=[0]",
    ],
}


def test_all_blocks_are_known():
    assert {kind for kind, _ in BLOCKS} == {"python", "bash"}
    assert set(ELSEWHERE) | set(SHORTENED) <= set(COMMANDS)


def test_python_blocks():
    """In order, in one namespace, as a reader would type them."""
    namespace: dict[str, object] = {}
    for kind, block in BLOCKS:
        if kind == "python":
            exec(compile(block, "README.md", "exec"), namespace)
    assert namespace["stats"] is not None


def environment():
    """Of this interpreter; and of nobody's account, whom `tracker.mode=online` would log in."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return {key: value for key, value in environment.items() if not key.startswith("WANDB_")}


@pytest.mark.slow
def test_commands(tmp_path):
    """In order, since some read what others wrote; in an empty home, where the online run falls back to offline."""
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "conf").symlink_to(ROOT / "conf")
    for command in COMMANDS:
        if command in ELSEWHERE:
            continue
        run = subprocess.run(
            [*shlex.split(command), *SHORTENED.get(command, [])],
            cwd=tmp_path,
            env=environment() | {"PYTHONPATH": str(ROOT), "HOME": str(home), "NETRC": str(home / "netrc")},
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, f"{command}\n{run.stdout}\n{run.stderr}"
        assert ("is tracked offline" in run.stderr) == ("tracker.mode=online" in command)
    (run,) = (tmp_path / "outputs/mine/wandb").glob("offline-run-*")
    (log,) = run.glob("*.wandb")
    leet = ["wandb", "leet", "inspect", "--summary", "--json", str(log)]
    summary = subprocess.run(leet, env=environment(), capture_output=True, text=True, check=True)
    assert "examples_seen" in summary.stdout


@pytest.mark.slow
def test_make_demo_in_an_empty_clone(tmp_path):
    """As a newcomer: a clone, then make demo, which makes its own environment."""
    clone = tmp_path / "gradstats"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    run = subprocess.run(["make", "demo"], cwd=clone, env=environment(), capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    for name in ("report.html", "figure.png", "figure.svg"):
        assert (clone / "outputs/demo" / name).stat().st_size > 1000
    assert list((clone / "outputs/demo").rglob("offline-run-*"))
