"""Whether estimates agree, what they cost in noise, and whether the critical batch size is where they say."""

from __future__ import annotations

import math

import numpy as np

from experiments.estimate import Finding, at_edge, listed, notes
from experiments.laboratory.noise_scale.analysis import Analysis
from experiments.laboratory.noise_scale.measure import METHODS, WHOLE
from experiments.laboratory.verdicts import equals, within

CLOSE = 0.1  # of the noise scale of all parameters
CLOSE_LAYER = 0.25  # of a layer's
CORRELATED = 0.9
FITS = 0.25  # of the steps, at the batch size where the law is furthest off
FACTOR = 3.0  # about half an order of magnitude, of a prediction that McCandlish et al. call one of orders of magnitude


def findings(found: Analysis) -> list[Finding]:
    s = found.settings
    return [
        *(_agrees(found, label) for label in s.contestants),
        *(_layers(found, label) for label in s.contestants),
        *(_quieter(found, label) for label in s.contestants),
        *(_norms(found, label, norm) for norm in found.norms for label in s.contestants),
        *(_law(found, label, target) for label in s.contestants for target in s.targets),
        *(_predicted(found, label, target) for label in s.contestants for target in s.targets),
        *(_grows(found, label) for label in s.contestants if len(s.targets) > 1),
        *_notes(found),
    ]


def _agrees(found: Analysis, label: str) -> Finding:
    ratio = found.agreement(label, WHOLE)
    one, two = (found.told(label, method) for method in METHODS)
    s = found.settings
    return Finding(
        f"{label}: the noise scale from the norms of examples, in one pass, is that of two batch sizes, within "
        f"{CLOSE:.0%}",
        equals(ratio, CLOSE),
        f"It is {ratio} times that of batches of {s.small} and {s.big}, over the run. Of the noise scale over the "
        f"training set the one is {one}, the other {two} times.",
    )


def _layers(found: Analysis, label: str) -> Finding:
    ratios = {layer: found.agreement(label, layer) for layer in found.layers}
    worst = max(ratios.values(), key=lambda ratio: abs(math.log(ratio.value)) if ratio.value > 0 else math.inf)
    told = ", ".join(f"{ratio} in {layer}" for layer, ratio in ratios.items())
    return Finding(
        f"{label}: so it is in every layer, within {CLOSE_LAYER:.0%}",
        equals(worst, CLOSE_LAYER),
        f"The noise scale of one pass over that of two batch sizes is {told}.",
    )


def _quieter(found: Analysis, label: str) -> Finding:
    ratio, s = found.spread_ratio(label), found.settings
    one, two = (found.error(label, method) for method in METHODS)
    return Finding(
        f"{label}: of the same examples, norms of examples tell the noise scale with a smaller error than norms of "
        f"shards of {s.small}",
        ratio.verdict(1),
        f"The relative error of one draw of {s.big} examples is {one} against {two}, a ratio of {ratio}.",
    )


def _norms(found: Analysis, label: str, norm: str) -> Finding:
    correlation = found.correlation(label, norm)
    return Finding(
        f"{label}: along the run the noise scale of the normalisation layer alone follows the total: logarithms have a "
        f"correlation of {CORRELATED:g} or more",
        within(correlation, CORRELATED, math.inf),  # an interval that was widened may end above 1
        f"In {norm} it is {correlation}, and the noise scale {found.share(label, norm)} times that of all parameters.",
    )


def _law(found: Analysis, label: str, target: float) -> Finding:
    misfit = found.contest.over_finite(lambda rows: math.exp(found.knee(label, target, rows).misfit))
    told = ", ".join(f"{one.text()} at B = {one.batch_size}" for one in found.arrivals[label, target])
    fit = f"B_crit is {found.measured_size(label, target)}, and the furthest off is by a factor of {misfit}."
    return Finding(
        f"{label}: steps to a training loss of {target:g} are S_min (1 + B_crit/B), within {FITS:.0%}",
        misfit.verdict(1 + FITS),
        f"They are {told}. {_censored(found, label, target) or fit}",
    )


def _predicted(found: Analysis, label: str, target: float) -> Finding:
    ratio = found.ratio(label, target)
    numbers = (
        f"It tells {found.predicted_size(label, target)}, and {found.measured_size(label, target)} is measured: a "
        f"ratio of {ratio}."
    )
    return Finding(
        f"{label}: the noise scale along the run tells the critical batch size at a loss of {target:g}, within a "
        f"factor of {FACTOR:g}",
        within(ratio, 1 / FACTOR, FACTOR),
        f"{numbers} {_why(found, label, target)}".rstrip(),
    )


def _why(found: Analysis, label: str, *targets: float) -> str:
    """Numbers are missing, if runs do not come to the losses."""
    followed = [
        f"Not every run that is followed comes to {target:g}."
        for target in targets
        if np.isnan(found.told_by_run[label, target]).any()
    ]
    return " ".join([*followed, *filter(None, (_censored(found, label, target) for target in targets))])


def _censored(found: Analysis, label: str, target: float) -> str:
    sizes = [one.batch_size for one in found.arrivals[label, target] if one.is_censored]
    if not sizes:
        return ""
    return f"Nothing is fitted: at B in {listed(sizes)} no learning rate brings the runs of all seeds to {target:g}."


def _grows(found: Analysis, label: str) -> Finding:
    first, last = found.settings.targets[0], found.settings.targets[-1]
    told = found.contest.over_finite(lambda r: found.predicted(label, last, r) / found.predicted(label, first, r))
    seen = found.contest.over_finite(lambda r: found.knee(label, last, r).size / found.knee(label, first, r).size)
    both = found.contest.over_finite(
        lambda r: (
            (found.predicted(label, last, r) / found.predicted(label, first, r))
            / (found.knee(label, last, r).size / found.knee(label, first, r).size)
        )
    )
    return Finding(
        f"{label}: from a loss of {first:g} to one of {last:g} the critical batch size grows as the noise scale tells, "
        "within a factor of 2",
        within(both, 0.5, 2.0),
        f"It grows {seen} times, and the noise scale tells {told} times. {_why(found, label, first, last)}".rstrip(),
    )


def _notes(found: Analysis) -> list[Finding]:
    edges = [
        f"{label} at B = {one.batch_size} and a loss of {target:g}"
        for (label, target), of_target in found.arrivals.items()
        for one in of_target
        if one.at_edge
    ]
    told = [f"{label}, from {_range(found, label)}" for label in found.settings.contestants]
    return [
        *notes([f"Along the run, over the training set, the noise scale is, for {'; for '.join(told)}."]),
        *notes(at_edge("lr", edges)),
    ]


def _range(found: Analysis, label: str) -> str:
    highest = int(found.followed[label].scale().mean(axis=0).argmax())
    first, top, last = (found.scale_at(label, look) for look in (0, highest, -1))
    return f"{first} to {top} at most, and {last} at the end"
