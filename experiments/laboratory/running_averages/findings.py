"""What is claimed of running averages, and what they do on noisy data."""

from __future__ import annotations

from experiments.estimate import Finding, over_seeds
from experiments.laboratory.running_averages.analysis import LABELS, Analysis, of
from experiments.laboratory.running_averages.smoothing import AVERAGES
from experiments.laboratory.verdicts import equals

TOLERANCE = 0.1  # of what is measured on draws, against a closed form


def findings(analysis: Analysis) -> list[Finding]:
    return [
        _start(analysis),
        *(_early(kind, analysis) for kind in ("debiased_ewma", "slides")),
        *(_suppression(kind, analysis) for kind in ("ewma", "debiased_ewma")),
        _one_of_n(analysis),
        _equal_noise(analysis),
        _warm_up(analysis),
    ]


def _start(analysis: Analysis) -> Finding:
    ewma = AVERAGES.index("ewma")
    ratio = over_seeds(analysis.level_of_start[:, :, ewma].mean(axis=1))
    return Finding(
        f"Without debiasing an EWMA is wrong early, by the factor 1 - beta^t, within {TOLERANCE:.0%}",
        equals(ratio, TOLERANCE),
        f"Over the first quarter of a horizon it shows {over_seeds(analysis.level[:, :, ewma].mean(axis=1))} of the "
        f"offset, which is {ratio} of what the factor says.",
    )


def _early(kind: str, analysis: Analysis) -> Finding:
    distance = over_seeds(analysis.apart[:, :, AVERAGES.index(kind)].max(axis=1))
    return Finding(
        f"Over the first quarter of a horizon, {LABELS[kind]} is the simple mean, to a tenth of that mean's own noise",
        distance.verdict(0.1),
        f"At the horizon where they differ most, they are {distance} standard deviations of the simple mean apart.",
    )


def _suppression(kind: str, analysis: Analysis) -> Finding:
    claimed = 1 / (2 * analysis.horizons - 1)
    ratio = over_seeds((of(analysis.noise, kind, "offset", "settled") / claimed).mean(axis=1))
    return Finding(
        f"Once settled, {LABELS[kind]} keeps the share (1 - beta)/(1 + beta) of the noise, within {TOLERANCE:.0%}",
        equals(ratio, TOLERANCE),
        f"Measured over claimed, mean over horizons: {ratio}.",
    )


def _one_of_n(analysis: Analysis) -> Finding:
    noise, horizons = analysis.noise, analysis.horizons
    ratio = over_seeds((of(noise, "slides", "offset", "settled") * horizons).mean(axis=1))
    early = over_seeds((analysis.noise_at_horizon[:, :, AVERAGES.index("slides")] * horizons).mean(axis=1))
    last = over_seeds((of(noise, "window", "offset", "settled") * (2 * horizons - 1)).mean(axis=1))
    return Finding(
        f"{LABELS['slides']} keeps 1/N of the noise, within {TOLERANCE:.0%}",
        equals(ratio, TOLERANCE),
        f"Measured over claimed, mean over horizons: {early} after N examples, and {ratio} once settled, where it is "
        "an exponential average. For a window, which weighs its examples alike, measured over one in its length is "
        f"{last}.",
    )


def _equal_noise(analysis: Analysis) -> Finding:
    mine, windows = (of(analysis.tracking, kind, "cosine", "settled") for kind in ("debiased_ewma", "window"))
    ratio = over_seeds((mine / windows).mean(axis=1))
    worst = over_seeds((mine / windows)[:, -1])
    return Finding(
        "At equal noise suppression an exponential average tracks a cosine better than a window",
        ratio.verdict(1),
        f"Its squared tracking error is {ratio} of the window's, mean over horizons, and {worst} at the longest.",
    )


def _warm_up(analysis: Analysis) -> Finding:
    slides, debiased = (
        of(analysis.tracking, kind, "cosine", "warm-up") + of(analysis.noise, kind, "cosine", "warm-up")
        for kind in ("slides", "debiased_ewma")
    )
    ratio = over_seeds((slides / debiased).mean(axis=1))
    longest = over_seeds((slides / debiased)[:, -1])
    return Finding(
        f"In the warm-up {LABELS['slides']} has a lower total error on a cosine than {LABELS['debiased_ewma']}",
        ratio.verdict(1),
        f"Its squared error, noise and lag together, is {ratio} of the other's over the first horizon, mean over "
        f"horizons, and {longest} at the longest; once settled the two are the same average.",
    )
