"""Whether the private step is Opacus', what privacy costs, and which method pays least."""

from __future__ import annotations

import numpy as np

from experiments.estimate import Finding, at_edge, notes
from experiments.laboratory.private.analysis import OTHERS, Analysis
from experiments.laboratory.private.methods import ADAM, CORRECTED, METHODS, SGD
from experiments.laboratory.private.peers import BASES, KEPT, OURS
from experiments.laboratory.verdicts import within

EQUAL = 1e-9  # of how far parameters went, in float64
CHEAP = 0.05  # of accuracy
MOSTLY = 0.5  # of the second moment


def findings(found: Analysis) -> list[Finding]:
    epsilons = found.settings.epsilons
    return [
        *(_equal(found, base) for base in BASES),
        *(_adam(found, epsilon) for epsilon in epsilons),
        *(_corrected(found, epsilon) for epsilon in epsilons),
        _noise(found),
        _cheap(found),
        *notes([_speed(found), _noise_multipliers(found), *_edges(found)]),
    ]


def _equal(found: Analysis, base: str) -> Finding:
    worst = {other: float(found.difference[base, other].max()) for other in OTHERS}
    told = " and ".join(f"{value:.1e} ({other})" for other, value in worst.items())
    return Finding(
        f"{base} by clipping with gradstats is {base} by Opacus' optimizers, at equal noise: parameters differ by at "
        f"most {EQUAL:.0e} of how far they went",
        "holds" if max(worst.values()) <= EQUAL else "does not hold",
        f"After {found.settings.checked_steps} steps in float64 they differ by at most {told}, over "
        f"{len(found.settings.seeds)} seeds.",
    )


def _accuracies(found: Analysis, epsilon: float) -> str:
    return ", ".join(f"{method} {found.accuracy(method, epsilon)}%" for method in METHODS)


def _adam(found: Analysis, epsilon: float) -> Finding:
    behind = found.ahead(SGD, ADAM, epsilon)
    return Finding(
        f"epsilon = {epsilon:g}: {ADAM} has a higher held-out accuracy than {SGD}",
        behind.verdict(0),
        f"{SGD} is {behind} points ahead: {_accuracies(found, epsilon)}. Training losses are "
        f"{found.loss(SGD, epsilon)} for {SGD} and {found.loss(ADAM, epsilon)} for {ADAM}.",
    )


def _corrected(found: Analysis, epsilon: float) -> Finding:
    behind = found.ahead(ADAM, CORRECTED, epsilon)
    return Finding(
        f"epsilon = {epsilon:g}: without the noise's variance in its second moment, {CORRECTED} has a higher held-out "
        f"accuracy than {ADAM}",
        behind.verdict(0),
        f"{ADAM} is {behind} points ahead of it. Training losses are {found.loss(ADAM, epsilon)} for {ADAM} and "
        f"{found.loss(CORRECTED, epsilon)} for {CORRECTED}; {SGD} is {found.ahead(SGD, CORRECTED, epsilon)} points "
        f"ahead of {CORRECTED}.",
    )


def _noise(found: Analysis) -> Finding:
    least = min((found.noise_share(ADAM, e) for e in found.settings.epsilons), key=lambda estimate: estimate.value)
    told = ", ".join(f"{found.noise_share(ADAM, e)}% at epsilon = {e:g}" for e in found.settings.epsilons)
    return Finding(
        f"What {ADAM} divides by is mostly noise: at least {MOSTLY:.0%} of its second moment, at every epsilon",
        within(least, MOSTLY, np.inf),
        f"Of the mean of its second moment over all elements, at the end of training, the variance of the noise is "
        f"{told}.",
    )


def _cheap(found: Analysis) -> Finding:
    epsilon, free = max(found.settings.epsilons), found.best(None)
    price = found.price(epsilon)
    told = ", ".join(f"{found.price(e)} at {e:g} ({found.best(e)})" for e in found.settings.epsilons)
    return Finding(
        f"At epsilon = {epsilon:g} privacy costs at most {100 * CHEAP:g} points of held-out accuracy",
        price.verdict(CHEAP),
        f"{found.best(epsilon)}, the method with the lowest training loss there, is {price} points below the "
        f"{found.best_accuracy(None)}% of the one with the lowest without privacy ({free}). By epsilon, the best is "
        f"below that by {told}.",
    )


def _speed(found: Analysis) -> str:
    milliseconds = {name: 1000 * float(np.median(values)) for name, values in found.seconds.items()}
    told = " and ".join(f"{found.times(other)} times with {other} ({milliseconds[other]:.1f} ms)" for other in OTHERS)
    return (
        f"A step of B = {found.settings.batch_size} takes {milliseconds[OURS]:.1f} ms with {OURS} on two hidden layers "
        f"of {found.settings.timed_width}, and {told}; steps of all three in turn, on this machine. {KEPT} keeps the "
        "gradients of all examples."
    )


def _noise_multipliers(found: Analysis) -> str:
    settings = found.settings
    told = "; ".join(
        f"sigma = {runs.sigma:.2f} spends {runs.spent:.3f} of epsilon = {epsilon:g}"
        for epsilon in settings.epsilons
        for runs in (found.runs[SGD, epsilon],)
    )
    steps = found.runs[SGD, None].steps
    return (
        f"By the accountant, {steps} steps at delta = {settings.delta:g}: {told}. Tuning, which sees the data too, is "
        "not counted."
    )


def _edges(found: Analysis) -> list[str]:
    cases = [
        f"{method}, {'no privacy' if epsilon is None else f'epsilon = {epsilon:g}'}"
        for (method, epsilon), runs in found.runs.items()
        if runs.tuned(found.everyone) in (0, len(runs.octaves) - 1)
    ]
    return at_edge("lr", cases)
