"""Whether ours are on torch's curves, and which method takes fewer steps at similar time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from experiments.estimate import Array, Finding, at_edge, notes
from experiments.laboratory.adam_and_friends.analysis import Analysis, ratio
from experiments.laboratory.adam_and_friends.race import CALM, METHODS
from experiments.laboratory.verdicts import both

# Each with what it improves on.
REFINEMENTS = {
    "momentum": ("sgd",),
    "rmsprop": ("sgd",),
    "adam": ("momentum", "rmsprop"),
}
SIMILAR_TIME = 1.5  # a step may take so much longer
EQUAL = 1e-9  # nats: room for what hundreds of steps make of the rounding of float64


def findings(analysis: Analysis) -> list[Finding]:
    refined = [_fewer_steps(better, than, analysis) for better, others in REFINEMENTS.items() for than in others]
    return [*(_same_curve(method, analysis) for method in METHODS), _less_time(analysis), *refined, *_notes(analysis)]


def _same_curve(method: str, analysis: Analysis) -> Finding:
    i = list(METHODS).index(method)
    exact = largest_difference(analysis.exact[:, i, 0], analysis.exact[:, i, 1])
    torch, loop, ours = (analysis.of(analysis.loss, method, side) for side in ("torch", "torch_loop", "ours"))
    return Finding(
        f"{METHODS[method].label}: ours, at torch's values and batch size, is on torch's curve",
        "holds" if exact <= EQUAL else "does not hold",
        f"In float64, at {CALM:g} of the best lr, the largest difference of their training losses is {exact:.1g} nats, "
        f"over {len(analysis.steps)} looks in {analysis.settings.steps:,} steps and {len(torch)} seeds; the bar is "
        f"{EQUAL:g}. In float32, at the best lr, it is {largest_difference(torch, ours):.1g}, and two forms of torch's "
        f"own are {largest_difference(torch, loop):.1g} apart.",
    )


def largest_difference(first: Array, second: Array) -> float:
    """Of two sets of curves; infinite where one of them alone is not finite."""
    finite = np.isfinite(first)
    if (finite != np.isfinite(second)).any():
        return np.inf
    return float(np.abs(first - second)[finite].max())


def _fewer_steps(method: str, than: str, analysis: Analysis) -> Finding:
    bar = (
        f"{METHODS[method].label} reaches the target in fewer steps than {METHODS[than].label}, a step taking at most "
        f"{SIMILAR_TIME:g} times as long"
    )
    if missed := _missed((method, than), analysis):
        return Finding(bar, "cannot be judged", missed)
    reached = [analysis.of(analysis.reached, name) for name in (method, than)]
    steps = ratio(*reached)
    time = ratio(*(analysis.of(analysis.step, name) for name in (method, than)))
    seconds = ratio(*(analysis.of(analysis.seconds_reached, name) for name in (method, than)))
    return Finding(
        bar,
        both(steps.verdict(1), time.verdict(SIMILAR_TIME)),
        f"Ratios of medians over {len(reached[0])} seeds: {steps} of the steps, {time} of the time a step, and "
        f"{seconds} of the seconds to the target.",
    )


def _less_time(analysis: Analysis) -> Finding:
    pair = ("sgd", "full_batch")
    bar = "SGD reaches the target in less time than full-batch descent"
    if missed := _missed(pair, analysis):
        return Finding(bar, "cannot be judged", missed)
    steps, seconds = (
        ratio(*(analysis.of(values, name) for name in pair)) for values in (analysis.reached, analysis.seconds_reached)
    )
    return Finding(bar, seconds.verdict(1), f"Ratios of medians: {steps} of the steps, {seconds} of the seconds.")


def _missed(methods: Sequence[str], analysis: Analysis) -> str:
    """Which of the methods does not reach the target with how many seeds; empty if all do."""
    for name in methods:
        counts = analysis.of(analysis.reached, name)
        if missed := int(np.isnan(counts).sum()):
            return (
                f"{METHODS[name].label} misses {analysis.settings.target:g} nats with {missed} of {len(counts)} seeds."
            )
    return ""


def _notes(analysis: Analysis) -> list[Finding]:
    prices = ", ".join(
        f"{method.label} {ratio(analysis.of(analysis.step, name, 'ours'), analysis.of(analysis.step, name))}"
        for name, method in METHODS.items()
    )
    told = [
        f"A step of ours takes, in units of torch's: {prices}. On a model of this size that is what Python costs; the "
        "benchmark says what it is on larger ones.",
        "Seconds are of one thread's processor time, measured beside other jobs of the study and whatever else ran on "
        "the machine: sharing a core does not count, sharing its caches does.",
    ]
    ends = {analysis.settings.lr_multipliers[0], analysis.settings.lr_multipliers[-1]}
    told += at_edge(
        "lr",
        [
            method.label
            for name, method in METHODS.items()
            if analysis.rates[name] in [method.lr * multiplier for multiplier in ends]
        ],
    )
    return notes(told)
