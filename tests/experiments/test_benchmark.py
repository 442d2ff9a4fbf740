"""`python -m experiments.benchmark` as a user meets it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from experiments import benchmark
from experiments.benchmark import parser, plan_of
from experiments.benchmarks import record
from experiments.benchmarks.contestants import CONTESTANTS
from experiments.benchmarks.workloads import SCALES, WORKLOADS
from tests.experiments.benchmarks.synthetic import run

ROOT = Path(__file__).parent.parent.parent
SMALL = ["mlp", "scale_depth", "--quick", "--threads", "1", "-c", "plain", "ours-second_moment"]


def launch(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["benchmark", *arguments])
    try:
        benchmark.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_a_quick_run_in_fresh_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new"
    monkeypatch.setattr(benchmark, "code", lambda: "0")  # sources may change while tests run
    assert launch(monkeypatch, *SMALL, "--output", str(output)) == 0
    printed = capsys.readouterr().out
    assert "mlp plain check: right" in printed and "| **gradstats** | second moment |" in printed
    written = json.loads((output / "benchmark.json").read_text())
    assert [(r["contestant"], r["error"]) for r in written["rows"]] == [
        ("plain", None),
        ("ours-second_moment", None),
    ]
    for r in written["rows"]:
        assert 0 < r["lower"] <= r["ratio"] <= r["upper"] and r["pairs"] == 2 and r["above"] is not None
    assert len(written["growths"]) == 2 and written["about"]["torch"] == torch.__version__
    assert (output / "benchmark.md").read_text().strip() in printed
    assert (output / "benchmark.png").stat().st_size > 1000
    assert launch(monkeypatch, *SMALL, "--output", str(output)) == 0  # nothing is left to measure
    again = capsys.readouterr().out
    assert "measurements are kept" in again and "check: right" not in again
    assert launch(monkeypatch, *SMALL, "--output", str(output), "--record") == 2
    assert "quick" in capsys.readouterr().err


def test_workloads_and_contestants_by_name_or_pattern() -> None:
    everything = plan_of(parser().parse_args([]))
    assert everything.workloads == [name for name in WORKLOADS if name != "gpt2_small"]
    assert everything.scales == list(SCALES) and everything.contestants == list(CONTESTANTS)
    some = plan_of(parser().parse_args(["linear_*", "gpt2_small", "-c", "*-norms"]))
    assert some.workloads == ["linear_t4", "linear_t16", "gpt2_small"] and not some.scales
    assert some.contestants == ["ours-norms", "backpack-norms", "opacus-norms"] and some.named


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lstm"], "no workload is called lstm: choose among mlp, "),
        (["-c", "theirs"], "no contestant is called theirs: choose among plain, "),
        (["--steps", "1"], "--steps: 2 at least"),
        (["--processes", "0"], "--processes: 1 at least"),
        (["--device", "cuda"], "--device cuda: there is no CUDA device here"),
        (["--record", "nowhere.json"], "nowhere.json is no benchmark.json of a run"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a device that is not there")
def test_wrong_arguments_are_one_message(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch(monkeypatch, *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")


def test_a_run_from_elsewhere_is_recorded_and_pages_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("docs").mkdir()
    record.PAGE.write_text("<!-- runs: how -->\n<!-- /runs -->\n")
    record.README.write_text("<!-- price: how -->\n<!-- /price -->\n")
    Path("measured.json").write_text(json.dumps(run().to_json()))
    assert launch(monkeypatch, "--record", "measured.json") == 0
    text = record.PAGE.read_text()
    assert len(json.loads(record.RECORD.read_text())) == 1 and "abacus" in text
    record.PAGE.write_text("<!-- runs: how -->\nlost\n<!-- /runs -->\n")
    assert launch(monkeypatch, "--pages") == 0
    assert record.PAGE.read_text() == text and len(json.loads(record.RECORD.read_text())) == 1


WITH_TORCH_ONLY = """
import sys
import torch, torch._dynamo
blocked = {"hydra", "omegaconf", "wandb", "opacus", "backpack", "sklearn", "matplotlib", "rich", "joblib", "scipy"}
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Block())
import experiments.benchmark
assert not blocked & {name.partition(".")[0] for name in sys.modules}
"""


def test_machines_that_only_measure_need_torch_only() -> None:
    subprocess.run([sys.executable, "-c", WITH_TORCH_ONLY], check=True, cwd=ROOT)
