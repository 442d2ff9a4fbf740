"""What `pip install .` gives: a library that imports with torch only, in a wheel that holds nothing else."""

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import gradstats

ROOT = Path(__file__).parent.parent

# Blocks everything that is neither torch, nor needed by torch, nor the standard library.
IMPORT_WITH_TORCH_ONLY = """
import sys
import torch, torch._dynamo
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Block())
import gradstats, gradstats.optim, gradstats.rules, gradstats.engines
model = torch.nn.Linear(2, 2)
gradstats.attach(model)
model(torch.ones(3, 2)).sum().backward()
gradstats.optim.BatchInvariantAdam(model.parameters()).step()
assert not {blocked!r} & {{name.partition(".")[0] for name in sys.modules}}
"""


def test_library_needs_torch_only():
    blocked = {
        "hydra",
        "omegaconf",
        "wandb",
        "opacus",
        "sklearn",
        "matplotlib",
        "rich",
        "joblib",
        "experiments",
        "scipy",
    }
    subprocess.run([sys.executable, "-c", IMPORT_WITH_TORCH_ONLY.format(blocked=blocked)], check=True, cwd=ROOT)


def test_wheel_holds_the_library_alone(tmp_path):
    # Without isolation: the build backend is a development dependency, and tests must not need the network.
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (wheel,) = tmp_path.glob("*.whl")
    assert f"-{gradstats.__version__}-" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names} == {"gradstats", f"gradstats-{gradstats.__version__}.dist-info"}
    assert "gradstats/py.typed" in names
    sources = {
        str(path.relative_to(ROOT)) for ending in ("py", "cpp") for path in (ROOT / "gradstats").rglob(f"*.{ending}")
    }
    assert sources <= set(names)
    metadata = zipfile.ZipFile(wheel).read(f"gradstats-{gradstats.__version__}.dist-info/METADATA").decode()
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert [line.split(":")[1].strip().partition(">")[0] for line in required] == ["torch"]


def test_library_never_imports_experiments():
    for path in (ROOT / "gradstats").rglob("*.py"):
        text = path.read_text()
        for name in ("experiments", "hydra", "wandb"):
            assert f"import {name}" not in text and f"from {name}" not in text, path


def test_constraints_pin_what_the_project_names():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {
        line.partition("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    }
    named = [*project["dependencies"], *(d for group in project["optional-dependencies"].values() for d in group)]
    names = {d.replace("[", ">").partition(">")[0].strip().lower() for d in named} - {"gradstats"}
    assert names <= pinned
