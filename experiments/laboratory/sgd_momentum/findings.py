"""What is claimed of momentum, and what the runs on the quadratic and on the digits say."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from experiments.estimate import Array, Estimate, Finding, at_edge, listed, notes, over_seeds, ratio_of_means
from experiments.laboratory.sgd_momentum.analysis import LABELS, UNITS, Analysis
from experiments.laboratory.verdicts import both, equals, within

ROUNDING = 1e-9  # of float64, over a thousand steps
NEAR = 0.05  # what is measured on draws is one number with the closed form
SIMILAR = 0.1  # where examples that are masked come between, each batch has another number of the others
FLAT = 0.1  # exponent of B: over a factor of 64, at most 1.5
SETTLED_SHARE = 0.5  # of the budget on the digits: what is left of a warm-up by then is not the warm-up's


def slope(values: Array, sizes: Sequence[int]) -> Estimate:
    """Exponent of B in values (S, B)."""
    fits = [np.polyfit(np.log(sizes), np.log(row), 1)[0] for row in values]
    return over_seeds(np.array(fits))


def findings(analysis: Analysis) -> list[Finding]:
    found = [
        _same_algorithm(analysis),
        _closed_form(analysis),
        _over_batch_sizes("the time to converge", analysis.time_by_size, analysis),
        _over_batch_sizes("the variance that SGD settles at", analysis.variance_by_size, analysis),
        *(_only_the_warm_up(method, analysis) for method in ("dampened", "debiased_ewma", "slides")),
        _total_effect(analysis),
        _near_zero_speed(analysis),
        _near_zero_memory(analysis),
        _torch_on_digits(analysis),
        *(
            _digits_over_batch_sizes(scaling, fraction, analysis)
            for fraction in analysis.settings.lr_fractions
            for scaling in ("fixed", "linear")
        ),
        *(_debiased_on_digits(fraction, analysis) for fraction in analysis.settings.lr_fractions),
    ]
    return [*found, *notes(at_edge("lr", ["the digits"] if analysis.at_edge else []))]


def _same_algorithm(analysis: Analysis) -> Finding:
    largest = float(analysis.difference.max())
    return Finding(
        "torch's momentum with lr = B lr0 / N_g is SGD along a running average",
        "holds" if largest < ROUNDING else "does not hold",
        f"On one stream of gradients, at B in {listed(analysis.settings.batch_sizes)}, thetas differ by at most "
        f"{largest:.1g}, where they begin at 1.",
    )


def _closed_form(analysis: Analysis) -> Finding:
    ratio = over_seeds(
        np.concatenate([analysis.variance_by_size[unit] / analysis.closed_form(unit) for unit in UNITS], axis=1).mean(
            axis=1
        )
    )
    return Finding(
        f"The settled variance is that of the theory, lr (1 + m) / ((1 - m) (2 (1 + m) - lr) B), within {NEAR:.0%}",
        equals(ratio, NEAR),
        f"Measured over theory, mean over batch sizes and both units: {ratio}.",
    )


def _over_batch_sizes(what: str, values: dict[str, Array], analysis: Analysis) -> Finding:
    torch, examples = (slope(values[unit], analysis.settings.batch_sizes) for unit in UNITS)
    return Finding(
        f"In examples, {what} does not depend on the batch size: its power of B is 0, within {FLAT:g}",
        within(examples, -FLAT, FLAT),
        f"Over B in {listed(analysis.settings.batch_sizes)} it goes like B to the power {examples} with lr0 and the "
        f"horizon as they are, and {torch} with torch's lr and momentum as they are.",
    )


def _only_the_warm_up(method: str, analysis: Analysis) -> Finding:
    half, tenth = (
        [analysis.time_to(level, name) for name in (method, "torch")] for level in (0.5, 0.1)
    )  # each of the method, and of the heavy ball
    rate = over_seeds((tenth[0] - half[0]) / (tenth[1] - half[1]))
    variance = over_seeds(analysis.variance[method] / analysis.variance["torch"])
    ahead = over_seeds((half[1] - half[0]) / analysis.settings.horizon)
    return Finding(
        f"Against torch's heavy ball, {LABELS[method]} changes only the warm-up, within {NEAR:.0%}",
        both(equals(rate, NEAR), equals(variance, NEAR)),
        f"On the quadratic it is {ahead} horizons ahead when the mean has halved; from a half to a tenth it takes "
        f"{rate} of the time, and it settles at {variance} of the variance.",
    )


def _total_effect(analysis: Analysis) -> Finding:
    worst = {key: float(np.abs(effect - 1).max()) for key, (_, effect) in analysis.effect.items()}
    ours = max(worst["heavy_ball", mixed] for mixed in (False, True))
    first = ", ".join(
        f"{LABELS[method]} {analysis.effect[method, False][1][0]:.3g}"
        for method in ("torch", "dampened", "debiased_ewma", "slides")
    )
    return Finding(
        "One example moves the parameters by lr0 g in total, whenever it comes",
        "holds" if ours < ROUNDING else "does not hold",
        f"For ours, heavy ball, the total effect is 1 to {ours:.1g}, whether batch sizes are equal or mixed. With "
        f"mixed ones {LABELS['ewma']} is up to {worst['ewma', True]:.2g} off. The first batch has {first}.",
    )


def _near_zero_speed(analysis: Analysis) -> Finding:
    shares = np.array(analysis.settings.informative)
    fewest, all_of_them = 0, -1
    times = analysis.time_by_share * shares  # in informative examples
    ratio = over_seeds(times[:, fewest] / times[:, all_of_them])
    return Finding(
        "The progress that an informative example makes does not depend on how many near-zero gradients come between, "
        f"within {SIMILAR:.0%}",
        equals(ratio, SIMILAR),
        f"With one example in {1 / shares[fewest]:g} informative, the mean falls to a tenth after {ratio} times as "
        "many informative examples as with all.",
    )


def _near_zero_memory(analysis: Analysis) -> Finding:
    shares = np.array(analysis.settings.informative)
    fewest, all_of_them = 0, -1
    memory = shares**2 / analysis.of_average
    ratio = over_seeds(memory[:, fewest] / (shares[fewest] * memory[:, all_of_them]))
    return Finding(
        "While it averages near-zero gradients, the running average forgets informative ones all the same, within "
        f"{SIMILAR:.0%}",
        equals(ratio, SIMILAR),
        f"By its noise, it averages {over_seeds(memory[:, all_of_them])} informative examples when all are, and "
        f"{over_seeds(memory[:, fewest])} when one in {1 / shares[fewest]:g} is: {ratio} of what forgetting by the "
        "number of examples predicts.",
    )


def _torch_on_digits(analysis: Analysis) -> Finding:
    first = analysis.settings.lr_fractions[0]
    ours, torch = (analysis.digits[scaling, first][:, analysis.home] for scaling in ("ours", "fixed"))
    between_seeds = float(torch[:, 1:].std(axis=0).mean())
    ratio = over_seeds(np.abs(ours - torch).max(axis=1) / between_seeds)
    largest = float(np.abs(np.exp(ours) - np.exp(torch)).max())
    return Finding(
        "On the digits ours, heavy ball, is torch's momentum at the batch size of tuning",
        ratio.verdict(0.1),
        f"The largest difference of the training losses, over {len(analysis.counts)} counts of examples and "
        f"{len(ours)} seeds, is {largest:.1g}; that of their logarithms is {ratio} of the standard deviation between "
        "seeds. The bar is a tenth of it.",
    )


def _digits_over_batch_sizes(scaling: str, fraction: float, analysis: Analysis) -> Finding:
    ours, theirs = (analysis.score(name, fraction) for name in ("ours", scaling))
    ratio = ratio_of_means(ours, theirs)
    return Finding(
        f"On the digits, {_lr(fraction)}, the learning curve depends less on B with lr0 and the horizon kept than with "
        f"{LABELS[scaling]}",
        ratio.verdict(1),
        f"Over B in {listed(analysis.settings.batch_sizes)} the scores are {over_seeds(ours)} and "
        f"{over_seeds(theirs)}: a ratio of {ratio}. Without the largest batch size they are "
        f"{_without_largest('ours', fraction, analysis)} and {_without_largest(scaling, fraction, analysis)}.",
    )


def _without_largest(scaling: str, fraction: float, analysis: Analysis) -> Estimate:
    return over_seeds(analysis.score(scaling, fraction, slice(0, -1)))


def _lr(fraction: float) -> str:
    return "at the tuned lr" if fraction == 1 else f"at {fraction:g} of the tuned lr"


def _debiased_on_digits(fraction: float, analysis: Analysis) -> Finding:
    gap = (analysis.digits["ours_debiased", fraction] - analysis.digits["ours", fraction])[:, analysis.home]
    late = over_seeds(gap[:, analysis.counts > SETTLED_SHARE * analysis.counts[-1]].mean(axis=1))
    first = over_seeds(gap[:, 1])
    return Finding(
        f"On the digits, {_lr(fraction)}, debiasing changes only the warm-up: ln(training loss) later by at most "
        f"{NEAR:g}",
        within(late, -NEAR, NEAR),
        f"ln(training loss) debiased minus heavy ball: {first} after {analysis.counts[1]:.0f} examples, {late} in the "
        "second half of the run.",
    )
