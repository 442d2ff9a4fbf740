from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from experiments import benchmark
from experiments.benchmark import STATISTICS, WORKLOADS, Workload, measure

TINY = Workload(lambda: nn.Linear(3, 2), lambda: (torch.randn(4, 3), torch.randint(0, 2, (4,))), F.cross_entropy)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in WORKLOADS:
        monkeypatch.setitem(WORKLOADS, name, TINY)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)  # one thread, for all tests


def test_every_statistic_is_compared_with_the_plain_step():
    found = measure("mlp", steps=4, warmup=1)
    assert [m.statistics for m in found] == list(STATISTICS)
    for m in found:
        assert 0 < m.lower <= m.ratio <= m.upper
        assert m.plain_ms > 0 and m.attached_ms > 0 and m.steps == 4


@pytest.mark.parametrize(("name", "workloads"), [([], list(WORKLOADS)), (["gpt"], ["gpt"])])
def test_a_workload_that_is_named_or_all(
    name: list[str], workloads: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    output = tmp_path / "new" / "benchmark.json"
    monkeypatch.setattr("sys.argv", ["benchmark", *name, "--steps", "2", "--output", str(output)])
    benchmark.main()
    written = json.loads(output.read_text())
    assert list(dict.fromkeys(result["workload"] for result in written["results"])) == workloads
    assert written["machine"]["torch"] == torch.__version__


@pytest.mark.parametrize("arguments", [["lstm"], ["--steps", "1"]])
def test_wrong_arguments_are_named(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("sys.argv", ["benchmark", *arguments])
    with pytest.raises(SystemExit) as end:
        benchmark.main()
    assert end.value.code == 2 and arguments[0] in capsys.readouterr().err
