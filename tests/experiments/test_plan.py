"""`python -m experiments.plan`, as a user meets it."""

from __future__ import annotations

import json
import re
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from experiments import plan as command
from experiments.plan import OTHER, Ranks, plan, read
from tests.experiments.conftest import Outcome

Launch = Callable[..., Outcome]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Launch:
    def run(*overrides: str) -> Outcome:
        output = str(tmp_path / "plans" / "plan.json")
        monkeypatch.setattr(sys, "argv", ["experiments.plan", *overrides, "--output", output])
        try:
            command.main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


def test_it_tells_and_writes(launched: Launch, tmp_path: Path) -> None:
    found = launched("experiment=digits", "train.batch_size=64", "world_size=8")
    assert found.code == 0, found.err
    text, written = ((tmp_path / "plans" / f"plan.{kind}").read_text() for kind in ("md", "json"))
    for expected in (
        r"4,810 parameters; B = 64 over 8 ranks \(ddp\), 8 examples on the largest",
        r"\| parameters \| 19.2 kB \| formula \|",
        r"\| activations \| [\d.]+ kB \| traced, without torch.compile \|",
        r"\| all-reduce \| 19.2 kB \| 19.2 kB \| 1.00 \|",
        r"\| \*\*all\*\* \| 1.62e\+05 \| 7.58e\+04 \|",
        r"Matmuls are 1.468 times the plain step's. Expected time of forward and backward: 1.\d\d times",
        r"an estimate from prices measured on .+, 2 threads, float32, 20\d\d",
    ):
        assert re.search(expected, text), expected
    assert "all-reduce" in found.out and "plan.json" in found.out
    numbers = json.loads(written)
    assert numbers["memory"]["parameters"] == numbers["traffic"][0]["extra"] == 4 * 4810
    assert numbers["rows"] == 8 and numbers["memory"]["peak"] > 5 * 4 * 4810


def test_billions_of_parameters_take_no_memory() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sizes = ("model.width=4096", "model.layers=8", "model.heads=32", "data.words=32000", "data.context=2048")
    config, ranks = read(["experiment=gpu_gpt2", *sizes, "world_size=64", "parallel=fsdp", "train.batch_size=64"])
    found = plan(config, ranks)
    assert found.parameters == pytest.approx(1.75e9, rel=0.01)
    assert found.memory.parameters == pytest.approx(4 * found.parameters / 64, rel=0.01)
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert grown < found.parameters
    # Nothing has been measured in bfloat16.
    assert found.overhead is None and found.measured_on is None
    rest = {row.kind: row.plain for row in found.flops}
    assert 0.02 * rest["Linear"] < rest[OTHER] < 0.3 * rest["Linear"]


def test_statistics_of_every_kth_step_are_a_kth() -> None:
    one, fourth = (
        plan(read([*overrides, "train.checkpoint_every_examples=8192"])[0], Ranks(2))
        for overrides in (["engine.every=1"], ["engine.every=4"])
    )
    assert one.overhead is not None and fourth.overhead is not None
    assert fourth.overhead - 1 == pytest.approx((one.overhead - 1) / 4)
    assert fourth.traffic[0].extra == one.traffic[0].extra / 4
    assert [row.matmuls for row in fourth.flops] == [row.matmuls / 4 for row in one.flops]
    assert fourth.memory == one.memory


def test_of_torchs_own_nothing_is_added() -> None:
    found = plan(read(["optimizer=adam"])[0], Ranks(2))
    assert found.overhead == 1 and found.memory.statistics == found.traffic[0].extra == 0
    assert all(row.matmuls == row.squares == 0 for row in found.flops) and found.flops[0].plain > 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["wrld=3"], "Could not override 'wrld'"),
        (["optimizer=none"], "optimizer"),
        (["world_size=many"], "Value 'many' of type 'str' could not be converted to Integer"),
        (["parallel=pipeline"], "pipeline"),
        (["world_size=17"], "train.batch_size=16 is the batch of all 17 ranks together"),
        (["experiment=temperature"], "a study is many runs"),
        (["optimizer=batch_invariant_sign_sgd_example"], "no formula says what sign_mean costs"),
        (["data=tokens"], "model=mlp does not read this data"),
    ],
)
def test_what_is_wrong_is_one_message(launched: Launch, overrides: list[str], message: str) -> None:
    found = launched(*overrides)
    assert found.code == 2 and re.search(message, found.err) and "Traceback" not in found.err
