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
    "make demo": "test_make_demo_in_an_empty_clone",
    "make test": "this very suite",
    "python -m experiments.train experiment=demo": "test_make_demo_in_an_empty_clone",
    "python -m experiments.train experiment=batch_size_invariance": "composed and cut short in tests/experiments/test_study.py",
    "wandb leet outputs/mine/wandb": "interactive: its headless form is below",
    "wandb sync outputs/mine/wandb/offline-run-*": "needs an account",
    "python -m experiments.train experiment=digits tracker.mode=online": "needs an account",
}


def test_all_blocks_are_known():
    assert {kind for kind, _ in BLOCKS} == {"python", "bash"}
    assert set(ELSEWHERE) <= set(COMMANDS)


def test_python_blocks():
    """In order, in one namespace, as a reader would type them."""
    namespace: dict[str, object] = {}
    for kind, block in BLOCKS:
        if kind == "python":
            exec(compile(block, "README.md", "exec"), namespace)
    assert namespace["stats"] is not None


def environment():
    return os.environ | {
        "WANDB_MODE": "offline",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }


@pytest.mark.slow
def test_commands(tmp_path):
    """In order, since some read what others wrote."""
    (tmp_path / "conf").symlink_to(ROOT / "conf")
    for command in COMMANDS:
        if command in ELSEWHERE:
            continue
        run = subprocess.run(
            [sys.executable if word == "python" else word for word in shlex.split(command)],
            cwd=tmp_path,
            env=environment() | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, f"{command}\n{run.stdout}\n{run.stderr}"
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
