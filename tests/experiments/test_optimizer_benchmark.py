"""What is measured of an optimizer step; without compilation, which takes seconds."""

from __future__ import annotations

import json
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

from experiments import optimizer_benchmark
from experiments.optimizer_benchmark import SHAPES, Measurement, measure, tables_of


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer_benchmark, "FORMS", {"plain": False})
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)  # one thread, for all tests


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("parameters", [10_000_000, 100_000_000])
def test_models_have_the_size_that_was_asked_for(shape: str, parameters: int) -> None:
    with torch.device("meta"):
        model, _ = SHAPES[shape](parameters)
    sizes = [p.numel() for p in model.parameters()]
    assert sum(sizes) == pytest.approx(parameters, rel=0.02)
    small = sum(size < 10_000 for size in sizes)
    assert (len(sizes), small) == {("gpt", 10**7): (64, 43), ("gpt", 10**8): (148, 99)}.get((shape, parameters), (6, 3))


@pytest.mark.parametrize("name", ["batch_invariant_adam", "batch_invariant_sgd", "microbatch_adamw", "adam"])
def test_both_of_a_duel_take_their_steps(name: str) -> None:
    form = "foreach" if name == "adam" else "plain"
    found = measure("mlp", 3000, name, form, steps=2, threads=1, warmup=1)
    assert [m.contestant for m in found] == ["AdamW, fused", f"{'AdamW' if name == 'adam' else name}, {form}"]
    for m in found:
        assert m.milliseconds > 0 and 0 < m.lower <= m.ratio <= m.upper and m.steps == 2
        # State is made in the first step: two averages, or the one of SGD; a counter for each tensor.
        assert round(m.state_bytes_per_parameter) == (4 if m.contestant.startswith("batch_invariant_sgd") else 8)
    assert found[0].ratio == 1
    assert found[-1].path == "torch" if name == "adam" else "plain torch" in found[-1].path


def test_a_table_for_each_model_has_torchs_rows_once() -> None:
    def row(contestant: str, parameters: int, ratio: float) -> Measurement:
        return Measurement("mlp", parameters, 6, contestant, "", 1.0, ratio - 0.1, ratio, ratio + 0.1, 8.0, 5)

    first = [row("AdamW, fused", 100, 1), row("one, plain", 100, 2)]
    found = [*first, row("AdamW, fused", 100, 9), row("other, plain", 100, 3), row("AdamW, fused", 200, 1)]
    small, large = tables_of(found)
    assert [r[0] for r in small.rows] == ["AdamW, fused", "one, plain", "other, plain"]
    assert [r[2] for r in small.rows] == ["1.00", "2.00", "3.00"]
    assert len(large.rows) == 1 and "200" in large.title


class Here:
    """In place of fresh processes, which would compile."""

    def __init__(self, *arguments, **options) -> None: ...

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *exception: object) -> None: ...

    def submit(self, function, *arguments) -> Future:
        future: Future = Future()
        future.set_result(function(*arguments))
        return future


def test_figures_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, document = tmp_path / "new" / "benchmark.json", tmp_path / "optimizers.md"
    document.write_text("# Price\n<!-- price: written -->\nold\n<!-- /price -->\nrest\n")
    monkeypatch.setattr(optimizer_benchmark, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(optimizer_benchmark, "METHODS", ["adam", "batch_invariant_adam"])
    sizes = ["--optimizers", "all", "--parameters", "3e3", "6e3", "--shapes", "mlp", "--steps", "2"]
    monkeypatch.setattr("sys.argv", ["benchmark", *sizes, "--output", str(output), "--document", str(document)])
    optimizer_benchmark.main()
    written = json.loads(output.read_text())
    assert [r["parameters"] for r in written["results"]] == [2976] * 6 + [5940] * 6  # three duels each
    assert written["machine"]["torch"] == torch.__version__
    text = document.read_text()
    assert "old" not in text and text.endswith("<!-- /price -->\nrest\n")
    assert text.count("| AdamW, foreach |") == 2 and f"torch {torch.__version__}" in text


@pytest.mark.parametrize(
    "arguments", [["--steps", "1"], ["--optimizers", "adam"], ["--optimizers", "adamant"], ["--shapes", "lstm"]]
)
def test_wrong_arguments_are_named(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["benchmark", *arguments])
    with pytest.raises(SystemExit) as end:
        optimizer_benchmark.main()
    assert end.value.code == 2 and arguments[0] in capsys.readouterr().err
