"""Every block and command of the README and of docs/ runs, and prints what the page says.

python -m tests.test_readme     writes what the blocks print, and the table of traps, into the pages
"""

import contextlib
import functools
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from experiments.documents import fill
from gradstats.engines import ENGINES
from gradstats.statistics import STATISTICS
from tests.models import HUGGING_FACE
from tests.trap_probe import PROBE
from tests.traps import EXACT, MODES, TRAPS

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", "docs/benchmark.md", "docs/exactness.md", "docs/experiments.md", "docs/optimizers.md"]
README = (ROOT / PAGES[0]).read_text()
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
BLOCKS = [block for name in PAGES for block in BLOCK.findall((ROOT / name).read_text())]
COMMANDS = [line.partition(" #")[0].strip() for kind, block in BLOCKS if kind == "bash" for line in block.splitlines()]

# Run elsewhere, or not runnable without what a test must not have.
ELSEWHERE = {
    "source .venv/bin/activate": "of the shell that types it; the clone test makes that environment",
    "make demo": "test_make_demo_in_an_empty_clone",
    "make test": "is what runs the tests",
    "make results": "takes hours",
    "python -m experiments.results --collect": "writes files of the project",
    "python -m experiments.train experiment=demo": "what make demo runs",
    "wandb leet outputs/mine/wandb": "fills a terminal until it is left: its headless form is below",
    "wandb sync outputs/mine/wandb/offline-run-*": "needs an account",
    "python -m experiments.workspace --entity ENTITY --project PROJECT": "needs an account",
    "python -m experiments.train data=mnist model=convnet": "needs a network: see data/test_openml.py",
    "python -m experiments.train data=mnist model=convnet data.path=FOLDER": "see data/test_images.py",
    "python -m experiments.train data=npz data.path=mine.npz": "a file of the user's: see data/test_arrays.py",
    "python -m experiments.train data=text data.path=mine.txt model=gpt optimizer.lr=0.002": "see data/test_text.py",
    "python -m experiments.data.tokens mine.txt mine.bin": "a file of the user's: see data/test_token_file.py",
    "python -m experiments.train experiment=gpu_resnet_cifar": "needs a network: see test_gpu_experiments.py",
    "python -m experiments.train experiment=gpu_gpt2 data.path=TOKENS.bin": "see test_gpu_experiments.py",
    "python -m experiments.train -m experiment=digits seed=0,1 directory=outputs/sweep resume=true "
    "hydra/launcher=slurm hydra.launcher.partition=NAME": "needs a cluster: see test_cluster.py",
    "python -m experiments.train -m experiment=digits seed=0,1 directory=outputs/sweep resume=true "
    "hydra/launcher=slurm hydra.launcher.tasks_per_node=4 hydra.launcher.gpus_per_node=4": "needs a cluster, too",
    "srun --nodes 2 --ntasks-per-node 1 torchrun --nnodes 2 --nproc-per-node 4 --max-restarts 3 --rdzv-backend c10d "
    "--rdzv-id $SLURM_JOB_ID --rdzv-endpoint HOST:29500 -m experiments.train experiment=gpu_gpt2 data.path=TOKENS.bin "
    "directory=outputs/gpt2 resume=true": "needs a cluster: of torchrun on one machine see test_distributed.py",
}
# Appended to a command that would take too long as it stands.
SHORTENED = {
    "python -m experiments.benchmark": ["--quick", "-c", "plain", "loop"],
    "python -m experiments.benchmark mlp gpt -c 'ours-*'": ["--quick"],
    "python -m experiments.optimizer_benchmark": ["--parameters", "1e4", "--shapes", "mlp", "--steps", "2"],
    "python -m experiments.faults": ["--kills", "1"],
    "python -m experiments.sampled": ["--epochs", "0.1", "--seeds", "0"],
    "python -m experiments.estimation_error": ["--draws", "2"],
    "python -m experiments.estimators": [
        "--tasks",
        "digits",
        "--epochs",
        "1",
        "--batch-sizes",
        "16",
        "64",
        "--seeds",
        "0",
    ],
    "python -m experiments.search experiment=search_digits": ["search.trials=2", "train.epochs=1", "search.seeds=[0]"],
    "python -m experiments.search experiment=digits search=learning_rate optimizer=adam directory=outputs/adam": [
        "search.trials=2",
        "train.epochs=1",
        "train.warmup_examples=0",
    ],
    "python -m experiments.tune experiment=digits": [
        *("train.epochs=2", "train.warmup_examples=256", "tune.seeds=[0,1]", "tune.factor=4", "tracker=none"),
    ],
    "python -m experiments.train data=topics model=gpt optimizer.lr=0.002": [
        *("data.limit=640", "train.epochs=2", "train.warmup_examples=256", "train.batch_size=64", "data.evaluated=64"),
    ],
    "python -m experiments.train experiment=short/one_dimensional": [
        *("study.repetitions=100", "study.steps=64", "study.seeds=[0,1]"),
    ],
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
    assert {kind for kind, _ in BLOCKS} == {"python", "bash", "text"}
    assert set(ELSEWHERE) | set(SHORTENED) <= set(COMMANDS)


def typed(page: str) -> str:
    """The page with what its Python blocks print: they run in order, in one namespace, as a reader would type them."""
    namespace: dict[str, object] = {}
    printed = ""

    def one(match: re.Match[str]) -> str:
        nonlocal printed
        kind, block = match.groups()
        if kind == "python":
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(block, "page", "exec"), namespace)
            printed = out.getvalue()
        return f"```text\n{printed}```" if kind == "text" else match[0]

    # What Inductor makes of a graph takes long, and is tested with compiled models.
    with mock.patch("torch.compile", functools.partial(torch.compile, backend="aot_eager")):
        return BLOCK.sub(one, page)


def traps() -> str:
    """A row for every trap, and the cases of it that are refused."""
    lines = ["| | trap | refused |", "|---|---|---|"]
    for number, trap in [*TRAPS.items(), ("", MODES), ("", PROBE)]:
        refused = "; ".join(name for name, case in trap.cases.items() if case.verdict is not EXACT)
        lines.append(f"| {number} | {trap.title} | {refused} |")
    return "\n".join(lines)


def written(name: str) -> str:
    """A page as its blocks and the tables of the tests have it."""
    page = typed((ROOT / name).read_text())
    return fill(page, "traps", traps(), Path(name)) if name == "docs/exactness.md" else page


def without_times(page: str) -> str:
    return re.sub(r"\d+\.\d+ s\b", "... s", page)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by Dynamo, as in test_compiled
@pytest.mark.parametrize("name", PAGES)
def test_pages_say_what_their_blocks_print(name):
    assert without_times(written(name)) == without_times((ROOT / name).read_text()), "python -m tests.test_readme"


def test_readme_names_all_that_there_is():
    missing = [name for name in (*STATISTICS, *ENGINES) if name not in README]
    plain = README.lower().replace("-", "").replace(" ", "")
    models = [name.partition(" on ")[0].replace("-", "").replace(" ", "") for name in HUGGING_FACE]
    assert not missing and not [name for name in models if name not in plain]


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
    shutil.copytree(ROOT / "docs", tmp_path / "docs")  # some write there
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


if __name__ == "__main__":
    for name in PAGES:
        (ROOT / name).write_text(written(name))
