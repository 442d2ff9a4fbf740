"""Who is right is timed, who is wrong is shown to be."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from experiments.benchmarks import measure
from experiments.benchmarks.contestants import CONTESTANTS, Contestant
from experiments.benchmarks.measure import check, error, peak_memory, time_steps
from experiments.benchmarks.peers import Loop
from experiments.benchmarks.stepper import Plain, Stepper, refuse_without_instructions
from experiments.benchmarks.workloads import WORKLOADS, Problem, Settings
from gradstats import matmul

COMPILED = [name for name in CONTESTANTS if name.endswith("compiled")]
# Their layers are not BackPACK's, and ghost clipping has no tied parameters.
UNABLE = {"gpt": ("backpack-",), "tied_head": ("backpack-", "opacus-ghost"), "vit": ("backpack-",)}


@pytest.mark.parametrize("contestant", [name for name in CONTESTANTS if name not in (*COMPILED, "ours-bf16")])
@pytest.mark.parametrize("workload", ["mlp", "gpt", "tied_head", "vit"])
@pytest.mark.filterwarnings("ignore")  # of other libraries, as in a process of its own
def test_contestants_are_right_where_they_can_be(workload: str, contestant: str, settings: Settings) -> None:
    if contestant.startswith("backpack") and importlib.util.find_spec("backpack") is None:
        pytest.skip("BackPACK is not installed")
    if contestant.startswith(UNABLE.get(workload, ("nobody",))):
        with pytest.raises((ValueError, NotImplementedError), match="no .* of|not supported"):
            check(workload, contestant, settings)
        return
    found = check(workload, contestant, settings)
    assert "error" not in found
    assert found["gradient_error"] < 1e-5
    if CONTESTANTS[contestant].tolerance == 1e-3:
        assert found["statistic_error"] < 1e-5


@pytest.mark.parametrize("workload", ["mlp", "vit"])
def test_rounding_is_shown(workload: str, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of squares that are added up over examples in bfloat16; the gradient's are not."""
    monkeypatch.setattr(matmul, "_cpu_multiplies_bfloat16", True)
    found = check(workload, "ours-bf16", settings)
    assert 1e-3 < found["statistic_error"] < matmul.ROUNDING[torch.bfloat16]
    assert found["gradient_error"] < 1e-5


def test_what_would_be_exact_is_no_row_of_bfloat16(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "_cpu_multiplies_bfloat16", True)
    assert check("gpt", "ours-bf16", settings) == {"error": "no layer has a matmul that it rounds"}
    monkeypatch.setattr(matmul, "_cpu_multiplies_bfloat16", False)
    for function, arguments in ((check, ()), (time_steps, (1, 1.0)), (peak_memory, ())):
        with pytest.raises(NotImplementedError, match="^no bfloat16 instructions on this processor$"):
            function("mlp", "ours-bf16", settings, *arguments)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    with pytest.raises(NotImplementedError, match="^no bfloat16 instructions on this GPU$"):
        refuse_without_instructions(torch.device("cuda"))


class Off(Loop):
    """Statistics and gradients that are wrong by a factor, or of another shape, or missing."""

    def __init__(self, problem: Problem, of_squares: float = 1, of_gradient: float = 1, change: Callable | None = None):
        super().__init__(problem, "second_moment")
        self.of_squares, self.of_gradient, self.change = of_squares, of_gradient, change

    def gradients(self) -> dict[str, Tensor]:
        return {name: self.of_gradient * g for name, g in super().gradients().items()}

    def statistics(self):
        found = {name: self.of_squares * q for name, q in super().statistics()["second_moment"].items()}
        return {"second_moment": self.change(found) if self.change else found}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"of_squares": 1.01}, "wrong: 1.0% off"),
        ({"of_gradient": 3}, "wrong gradient: 200.0% off"),
        ({"of_squares": float("nan")}, "wrong: nan% off"),
    ],
)
def test_wrong_results_are_shown_as_wrong(
    options: dict, message: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = Contestant("off", "second_moment", lambda problem: Off(problem, **options))
    monkeypatch.setitem(CONTESTANTS, "off", entry)
    assert check("mlp", "off", settings) == {"error": message}
    # An estimate may be off, its gradient may not.
    monkeypatch.setitem(CONTESTANTS, "off", replace(entry, tolerance=None))
    assert ("error" in check("mlp", "off", settings)) == ("of_gradient" in options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: {name: q[:1] for name, q in found.items()}, "shape (1, 784) for (16, 784) at 0.weight"),
        (lambda found: {}, "nothing for 0.weight"),
    ],
)
def test_results_of_another_shape_are_errors(
    change: Callable, message: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = Contestant("off", "second_moment", lambda problem: Off(problem, change=change))
    monkeypatch.setitem(CONTESTANTS, "off", entry)
    with pytest.raises(ValueError, match=re.escape(message)):
        check("mlp", "off", settings)


def test_a_reference_that_fails_is_not_held_against_a_peer(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(problem: Problem) -> Stepper:
        raise ValueError("no such engine")

    monkeypatch.setattr(measure, "reference", lambda contestant: fail)
    with pytest.raises(RuntimeError, match="not checked, since its reference fails: no such engine"):
        check("mlp", "loop", settings)


def test_error_is_the_largest_and_ignores_rounding_of_zero() -> None:
    expected = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([0.0])}
    assert error({"a": torch.tensor([3.0, 4.5]), "b": torch.tensor([0.0])}, expected) == pytest.approx(0.1)
    assert error({"a": expected["a"], "b": torch.tensor([1e-9])}, expected) == pytest.approx(1e-9 / 5e-6, rel=1e-3)


class Counting(Stepper):
    """Takes as long as it is told, by the clock that is patched."""

    def __init__(self, problem: Problem, seconds: float, clock: list[float], log: list[str], name: str) -> None:
        super().__init__(problem)
        self.seconds, self.clock, self.log, self.name = seconds, clock, log, name

    def step(self) -> None:
        self.log.append(self.name)
        self.clock[0] += self.seconds

    def clear(self) -> None:
        self.clock[0] += 0.5  # not of the step

    def settle(self) -> None:
        self.log.append("settled")


@pytest.mark.parametrize(
    ("own", "cycle", "steps", "seconds", "warm", "pairs"),
    [
        (0.15, 1, 6, 1e9, 3, 6),  # as many as asked for
        (0.15, 1, 6, 1.4, 2, 2),  # two at least, if the first of them is not too long itself
        (0.15, 1, 6, 0.0, 1, 1),
        (0.9, 1, 6, 1e9, 3, 2),  # so slow that two are enough
        (0.15, 4, 3, 1e9, 3, 3),  # cycles of four
        (0.15, 4, 3, 0.0, 1, 1),  # of which one has two steps at least
    ],
)
def test_steps_alternate_with_the_baseline(
    own: float,
    cycle: int,
    steps: int,
    seconds: float,
    warm: int,
    pairs: int,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, log = [0.0], []
    entry = Contestant(
        "",
        "",
        lambda problem: Counting(problem, own, clock, log, "own"),
        cycle=cycle,
        baseline=lambda problem: Counting(problem, 0.1, clock, log, "plain"),
    )
    monkeypatch.setitem(CONTESTANTS, "counting", entry)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])
    found = time_steps("mlp", "counting", settings, steps, seconds)
    assert found["plain"] == pytest.approx([0.1 * cycle] * pairs)
    assert found["seconds"] == pytest.approx([own * cycle] * pairs)
    taken = log[-2 * cycle * pairs :]
    assert len(log) - len(taken) == 1 + 2 * cycle * warm  # and whole cycles before
    assert log[0] == "settled"
    assert taken[0 : 2 * cycle] == ["own", "plain"] * cycle
    if pairs > 1:
        assert taken[2 * cycle : 4 * cycle] == ["plain", "own"] * cycle  # in another order every time


def test_probes_are_not_timed(settings: Settings) -> None:
    stepper = CONTESTANTS["ours-second_moment"].make(WORKLOADS["mlp"].problem(settings))
    stepper.settle()
    probes = stepper.handle.probe_cost[0]
    for _ in range(10):
        stepper.step()
        stepper.clear()
    assert stepper.handle.probe_cost[0] == probes


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
def test_memory_above_plain_is_what_is_held(settings: Settings) -> None:
    peaks = {
        name: peak_memory("mlp", name, settings)
        for name in ("plain", "ours-second_moment", "opacus-second_moment", "ours-every")
    }
    size = peaks["plain"]["parameters"]
    assert size == 4 * (785 * 16 + 17 * 16 + 17 * 10)
    above = {name: (m["peak"] - peaks["plain"]["peak"]) / size for name, m in peaks.items()}
    assert 0.95 < above["ours-second_moment"] < 1.5  # the statistic itself
    assert above["opacus-second_moment"] > 8  # a gradient for each of eight examples
    assert 0.95 < above["ours-every"] < 1.5  # a step that gathers is among the measured ones


def test_plain_has_the_memory_of_its_gradients(settings: Settings) -> None:
    found = peak_memory("embedding", "plain", settings)
    problem = WORKLOADS["embedding"].problem(settings)
    stepper = Plain(problem)
    stepper.step()
    gradients = sum(g.nbytes for g in stepper.gradients().values())
    assert gradients == found["parameters"] <= found["peak"] < 10 * gradients
