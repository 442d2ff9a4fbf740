"""What is measured of one contestant on one workload, each by a process of its own."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from experiments.benchmarks import meter
from experiments.benchmarks.contestants import CONTESTANTS, EXACT, ROUNDED, SINGLE, reference
from experiments.benchmarks.stepper import Plain, Stepper
from experiments.benchmarks.turns import alternate
from experiments.benchmarks.workloads import Settings, find

WARMUP = 3  # pairs of steps, or of cycles, if they are quick: what the first ones choose and allocate, later ones find
FEWEST = 2  # measured pairs of steps, unless the one to warm up already takes too long
SETTLED = 2.0  # times the baseline: the price of what is that slow need not be known any better
CHECKED = 24  # examples, on which whoever is wrong would be so
NEGLIGIBLE = 1e-6  # of the whole statistic: where a parameter's gradient is zero but for rounding

Measured = dict[str, Any]


def check(workload: str, contestant: str, settings: Settings) -> Measured:
    """Relative errors of gradient and statistics after one step in float64 (under autocast where that is measured, in
    float32 for contestants that have no float64), the largest over parameters: of the gradient against plain torch, of
    the statistics against `reference`."""
    prepare(settings)
    one = CONTESTANTS[contestant]
    exact = settings.dtype == torch.float32 and one.double

    def stepped(make: Callable[..., Stepper]) -> Stepper:
        problem = find(workload).problem(settings).first(CHECKED)
        # In float32 a ReLU whose input rounds to either side of 0 takes more than the last digits from torch itself.
        stepper = make(problem.double() if exact else problem)
        stepper.step()
        return stepper

    tried = stepped(one.make)
    gradients, found = tried.gradients(), tried.statistics()
    plain = stepped(Plain).gradients()
    least = EXACT if exact else SINGLE if settings.dtype == torch.float32 else ROUNDED
    of_gradient = error(gradients, plain)
    if not of_gradient <= least:  # nan is not
        return {"error": f"wrong gradient: {of_gradient:.1%} off"}
    try:
        expected = stepped(reference(contestant)).statistics()
    except Exception as failed:
        raise RuntimeError(f"not checked, since its reference fails: {failed}") from failed
    of_statistics = max((error(found[name], expected[name]) for name in one.statistics), default=0.0)
    if one.tolerance is not None and not of_statistics <= max(least, one.tolerance):
        return {"error": f"wrong: {of_statistics:.1%} off"}
    if of_statistics < one.at_least:
        return {"error": "no layer has a matmul that it rounds"}
    return {"gradient_error": of_gradient, "statistic_error": of_statistics}


def error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest of ||a - b|| / max(||b||, 1e-6 ||all b||). Raises: ValueError for another shape."""
    for name, b in expected.items():
        if name not in found:
            raise ValueError(f"nothing for {name or 'the whole gradient'}")
        if found[name].shape != b.shape:
            raise ValueError(f"shape {tuple(found[name].shape)} for {tuple(b.shape)} at {name}")
    norms = {name: b.double().norm() for name, b in expected.items()}
    least = NEGLIGIBLE * torch.stack(list(norms.values())).norm()
    errors = [(found[name].double() - b).norm() / norms[name].clamp(min=least) for name, b in expected.items()]
    return float(torch.stack(errors).max())


def time_steps(workload: str, contestant: str, settings: Settings, steps: int, seconds: float) -> Measured:
    """Seconds of steps of the contestant, and of the steps of its baseline that they alternate with.

    Until there are `steps` pairs, or until `seconds` have passed. Of contestants whose steps differ, a cycle is one.
    Probes are left out: after the first step of a training run there is one at every doubling of its length.
    """
    prepare(settings)
    one = CONTESTANTS[contestant]
    baseline, stepper = (make(find(workload).problem(settings)) for make in (one.baseline, one.make))
    stepper.settle()
    begun, fewest = time.perf_counter(), FEWEST
    for i in range(WARMUP):
        for _ in range(one.cycle):
            one_step(stepper, settings)
            one_step(baseline, settings)
        if time.perf_counter() - begun > seconds:
            fewest = FEWEST if i else 1
            break
    taken: list[tuple[float, float]] = []
    turns = alternate((stepper, baseline))
    begun = time.perf_counter()
    while len(taken) * one.cycle < fewest or (
        len(taken) < steps and time.perf_counter() - begun < seconds and not slow(taken)
    ):
        pair, order = {baseline: 0.0, stepper: 0.0}, next(turns)
        for _ in range(one.cycle):
            for contender in order:
                pair[contender] += one_step(contender, settings)
        taken.append((pair[baseline], pair[stepper]))
    return {"plain": [plain for plain, _ in taken], "seconds": [own for _, own in taken], "cycle": one.cycle}


def slow(taken: list[tuple[float, float]]) -> bool:
    return statistics.median(own / plain for plain, own in taken) > SETTLED


def one_step(stepper: Stepper, settings: Settings) -> float:
    synchronize(settings)
    start = time.perf_counter()
    stepper.step()
    synchronize(settings)
    elapsed = time.perf_counter() - start
    stepper.clear()
    return elapsed


def peak_memory(workload: str, contestant: str, settings: Settings) -> Measured:
    """Bytes at the highest point of the steps after the first, with all that the contestant holds between them; and of
    the parameters."""
    prepare(settings)
    one, problem = CONTESTANTS[contestant], find(workload).problem(settings)
    before = meter.resident()
    counter: meter.Meter = meter.Cuda() if on_cuda(settings) else meter.Profiled()
    with counter.contestant():
        stepper = one.make(problem)
        one_step(stepper, settings)
        with counter.steps():
            for i in range(one.cycle):
                if i:
                    stepper.clear()
                stepper.step()
    parameters = sum(p.nbytes for p in problem.parameters().values())
    return {"peak": counter.peak, "resident": meter.resident() - before, "parameters": parameters}


def prepare(settings: Settings) -> None:
    torch.set_num_threads(settings.threads)
    if on_cuda(settings):
        torch.cuda.set_device(settings.device)


def on_cuda(settings: Settings) -> bool:
    return torch.device(settings.device).type == "cuda"


def synchronize(settings: Settings) -> None:
    if on_cuda(settings):
        torch.cuda.synchronize()
