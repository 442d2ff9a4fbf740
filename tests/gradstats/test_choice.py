"""The way that is fastest is taken, once and for all, and none is timed where runs must repeat."""

import pytest
import torch

from gradstats import choice
from gradstats.choice import ROUNDS, choices, fastest, pin


class Ways(dict):
    """Ways that take the given times by a clock of their own, or raise, and note that they ran."""

    def __init__(self, monkeypatch, **outcomes):
        self.ran, self.now = [], 0.0
        monkeypatch.setattr(choice.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(choice, "_chosen", {})
        super().__init__(
            {name: lambda name=name, outcome=outcome: self.run(name, outcome) for name, outcome in outcomes.items()}
        )

    def run(self, name, outcome):
        self.ran.append(name)
        duration = outcome.pop(0) if isinstance(outcome, list) and len(outcome) > 1 else outcome
        duration = duration[0] if isinstance(duration, list) else duration
        if isinstance(duration, Exception):
            raise duration
        self.now += duration
        return name


def test_the_fastest_by_its_best_run_is_kept(monkeypatch):
    ways = Ways(monkeypatch, first=[2.0], warming=[9.0, 1.0], last=[1.5])
    assert [fastest("key", ways) for _ in range(3)] == ["warming"] * 3
    assert ways.ran == [*["first", "warming", "last"] * ROUNDS, *["warming"] * 3]


def test_keys_are_measured_separately(monkeypatch):
    ways = Ways(monkeypatch, a=[1.0] * 3 + [9.0], b=[2.0])
    assert (fastest(("form", 8), ways), fastest(("form", 16), ways)) == ("a", "b")
    assert choices() == {("form", 8): "a", ("form", 16): "b"}


def test_what_is_pinned_is_taken_unmeasured(monkeypatch):
    ways = Ways(monkeypatch, a=1.0, b=2.0)
    pin({"key": "b"})
    assert fastest("key", ways) == "b" and ways.ran == ["b"]
    choices()["key"] = "a"  # a copy
    assert fastest("key", ways) == "b" and choices() == {"key": "b"}


def test_a_way_that_is_there_no_longer_is_replaced(monkeypatch):
    ways = Ways(monkeypatch, a=2.0, b=1.0)
    pin({"key": "compiled elsewhere"})
    assert fastest("key", ways) == "b"


@pytest.mark.parametrize("count", [1, 2])
def test_runs_that_must_repeat_take_the_first_way(monkeypatch, count):
    ways = Ways(monkeypatch, **dict(list({"first": 2.0, "second": 1.0}.items())[:count]))
    torch.use_deterministic_algorithms(count > 1)
    try:
        assert fastest("key", ways) == "first"
    finally:
        torch.use_deterministic_algorithms(False)
    assert ways.ran == ["first"] and choices() == {}


def test_unmeasured_takes_the_first_way(monkeypatch):
    ways = Ways(monkeypatch, slow=2.0, fast=1.0)
    with choice.unmeasured():
        assert fastest("key", ways) == "slow"
    assert ways.ran == ["slow"] and "key" not in choices()
    assert fastest("key", ways) == "fast"


def test_a_graph_takes_the_first_way():
    """Time cannot be measured while a graph is traced."""
    ran = []

    def way(name):
        ran.append(name)
        return lambda: torch.ones(2) * (1 if name == "first" else 2)

    compiled = torch.compile(lambda: fastest("key", {"first": way("first"), "second": way("second")}), backend="eager")
    assert compiled().tolist() == [1, 1]
    assert "key" not in choices()


class OutOfResources(Exception):
    """As Triton calls it."""


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("out"), MemoryError(), RuntimeError("can't allocate memory"), OutOfResources("memory")],
)
def test_a_way_without_memory_is_not_chosen(monkeypatch, error):
    ways = Ways(monkeypatch, greedy=error, late=[0.5, error], modest=[1.0])
    assert fastest("key", ways) == "modest"
    assert ways.ran.count("greedy") == 1 and ways.ran.count("late") == 2


def test_other_errors_and_the_last_out_of_memory_are_raised(monkeypatch):
    with pytest.raises(RuntimeError, match="shapes"):
        fastest("key", Ways(monkeypatch, a=RuntimeError("shapes"), b=1.0))
    with pytest.raises(MemoryError, match="last"):
        fastest("key", Ways(monkeypatch, a=MemoryError("first"), b=MemoryError("last")))


def test_the_allocator_says_so():
    """The words by which torch's error on the CPU is known."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    assert choice.lacks_memory(caught.value)


def test_triton_says_so():
    """The name by which its error is known."""
    errors = pytest.importorskip("triton.runtime.errors")
    assert choice.lacks_memory(errors.OutOfResources(2, 1, "shared memory"))
    assert not choice.lacks_memory(errors.PTXASError("failed"))
