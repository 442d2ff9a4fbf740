"""Running averages on noisy data: the wrong start, the noise that is left, and the lag behind a moving signal."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from experiments.cube import Cube, cube
from experiments.documents import Cell, Table
from experiments.errors import UserError
from experiments.estimate import Array, Finding, over_seeds
from experiments.jobs import Job, Result
from experiments.laboratory.running_averages.figure import draw
from experiments.laboratory.running_averages.smoothing import AVERAGES, PHASES, SIGNALS, measure, trace, window
from experiments.laboratory.schemas import RunningAveragesConfig
from experiments.laboratory.verdicts import equals
from experiments.schemas.run import Config
from experiments.study import Outcome, Study

LABELS = {
    "mean": "simple mean",
    "ewma": "EWMA from zero",
    "debiased_ewma": "EWMA, debiased",
    "slides": "min(t, N) mean",
    "window": "mean of the last 2N - 1",
}
SMALLEST_HORIZON = 8  # of which the first quarter is two examples: below it nothing could differ there
TOLERANCE = 0.1  # of what is measured on draws, against a closed form


class RunningAverages(Study[RunningAveragesConfig]):
    title = "Running averages"
    question = "What does a running average cost at its start, how much noise does it leave, and how far does it lag?"
    source = (
        "McAllester, TTIC 31230, SGD, Momentum, RMSProp, Adam: the running average with N = min(t, N), and momentum as "
        "one; Kingma & Ba 2015, section 3: an average from zero is wrong by the factor 1 - beta^t"
    )

    def check(self) -> None:
        super().check()
        settings = self.settings
        if settings.shown not in settings.horizons:
            raise UserError(f"study.shown={settings.shown} must be one of study.horizons={settings.horizons}")
        if min(settings.horizons) < SMALLEST_HORIZON:
            raise UserError(f"study.horizons={settings.horizons} must be {SMALLEST_HORIZON} examples or more")
        if settings.examples < (least := 2 * window(max(settings.horizons))):
            raise UserError(
                f"study.examples={settings.examples}, the second half of which is the settled phase, must be at least "
                f"{least} for a horizon of {max(settings.horizons)}"
            )

    def jobs(self, config: Config, known: Sequence[Result]) -> list[Job]:
        settings = self.settings
        data = {
            "examples": settings.examples,
            "period": settings.period,
            "offset": settings.offset,
            "noise": settings.noise,
        }
        jobs: list[Job] = [
            self.measurement(config, measure, horizon=horizon, draws=settings.draws, seed=seed, **data)
            for horizon in settings.horizons
            for seed in settings.seeds
        ]
        return [*jobs, self.measurement(config, trace, horizon=settings.shown, seed=settings.seeds[0], **data)]

    def outcome(self, results: Sequence[Result]) -> Outcome:
        settings = self.settings
        measured = [result for result in results if "draws" in result.coordinates]
        (shown,) = (result.found for result in results if "draws" not in result.coordinates)

        def axis(name: str) -> Cube:
            return cube(measured, ("seed", "horizon"), lambda found: found[name])

        # (seeds, horizons, averages, signals, phases); noise in units of that of the data
        tracking, noise = axis("tracking").values, axis("noise").values / settings.noise**2
        level, of_start, apart = (axis(name).values for name in ("level", "level_of_start", "apart"))
        at_horizon = axis("noise_at_horizon").values / settings.noise**2
        horizons = np.array(settings.horizons, dtype=float)
        return Outcome(
            tables=[
                _at_one_horizon(settings, level, tracking, noise),
                _along_horizons(settings, tracking, noise),
            ],
            findings=[
                _start(level, of_start),
                *(_early(kind, apart) for kind in ("debiased_ewma", "slides")),
                *(_suppression(kind, noise, horizons) for kind in ("ewma", "debiased_ewma")),
                _one_of_n(noise, at_horizon, horizons),
                _equal_noise(tracking),
                _warm_up(tracking, noise),
            ],
            draw=lambda theme: draw(settings, LABELS, shown, tracking, noise, theme),
            caption=caption(settings),
            alternative=alternative(settings, tracking, noise),
            terms=TERMS,
        )


def of(values: Array, kind: str, signal: str, phase: str) -> Array:
    """(seeds, horizons)"""
    return values[:, :, AVERAGES.index(kind), SIGNALS.index(signal), PHASES.index(phase)]


def _start(level: Array, of_start: Array) -> Finding:
    ewma = AVERAGES.index("ewma")
    ratio = over_seeds(of_start[:, :, ewma].mean(axis=1))
    return Finding(
        f"Without debiasing an EWMA is wrong early, by the factor 1 - beta^t, within {TOLERANCE:.0%}",
        equals(ratio, TOLERANCE),
        f"Over the first quarter of a horizon it shows {over_seeds(level[:, :, ewma].mean(axis=1))} of the offset, "
        f"which is {ratio} of what the factor says.",
    )


def _early(kind: str, apart: Array) -> Finding:
    distance = over_seeds(apart[:, :, AVERAGES.index(kind)].max(axis=1))
    return Finding(
        f"Over the first quarter of a horizon, {LABELS[kind]} is the simple mean, to a tenth of that mean's own noise",
        distance.verdict(0.1),
        f"At the horizon where they differ most, they are {distance} standard deviations of the simple mean apart.",
    )


def _suppression(kind: str, noise: Array, horizons: Array) -> Finding:
    claimed = 1 / (2 * horizons - 1)
    ratio = over_seeds((of(noise, kind, "offset", "settled") / claimed).mean(axis=1))
    return Finding(
        f"Once settled, {LABELS[kind]} keeps the share (1 - beta)/(1 + beta) of the noise, within {TOLERANCE:.0%}",
        equals(ratio, TOLERANCE),
        f"Measured over claimed, mean over horizons: {ratio}.",
    )


def _one_of_n(noise: Array, at_horizon: Array, horizons: Array) -> Finding:
    ratio = over_seeds((of(noise, "slides", "offset", "settled") * horizons).mean(axis=1))
    early = over_seeds((at_horizon[:, :, AVERAGES.index("slides")] * horizons).mean(axis=1))
    last = over_seeds((of(noise, "window", "offset", "settled") * (2 * horizons - 1)).mean(axis=1))
    return Finding(
        f"{LABELS['slides']} keeps 1/N of the noise, within {TOLERANCE:.0%}",
        equals(ratio, TOLERANCE),
        f"Measured over claimed, mean over horizons: {early} after N examples, and {ratio} once settled, where it is "
        "an exponential average. For a window, which weighs its examples alike, measured over one in its length is "
        f"{last}.",
    )


def _equal_noise(tracking: Array) -> Finding:
    mine, windows = (of(tracking, kind, "cosine", "settled") for kind in ("debiased_ewma", "window"))
    ratio = over_seeds((mine / windows).mean(axis=1))
    worst = over_seeds((mine / windows)[:, -1])
    return Finding(
        "At equal noise suppression an exponential average tracks a cosine better than a window",
        ratio.verdict(1),
        f"Its squared tracking error is {ratio} of the window's, mean over horizons, and {worst} at the longest.",
    )


def _warm_up(tracking: Array, noise: Array) -> Finding:
    slides, debiased = (
        of(tracking, kind, "cosine", "warm-up") + of(noise, kind, "cosine", "warm-up")
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


def _at_one_horizon(settings: RunningAveragesConfig, level: Array, tracking: Array, noise: Array) -> Table:
    at = settings.horizons.index(settings.shown)
    rows: list[list[Cell]] = []
    for i, kind in enumerate(AVERAGES):
        numbers = [
            level[:, at, i],
            of(noise, kind, "cosine", "warm-up")[:, at],
            of(tracking, kind, "cosine", "warm-up")[:, at],
            of(noise, kind, "cosine", "settled")[:, at],
            of(tracking, kind, "cosine", "settled")[:, at],
        ]
        rows.append([LABELS[kind], *map(over_seeds, numbers)])
    return Table(
        f"Averages of horizon N = {settings.shown}",
        "Level: on the offset, mean over the first quarter of a horizon, 1 is right. Noise: the share of the data's "
        "variance that is left. Lag: squared tracking error on the cosine. Warm-up: the first N examples; settled: the "
        f"second half of {settings.examples:,}. Brackets: 95% bootstrap intervals over {len(settings.seeds)} seeds of "
        f"{settings.draws} draws each.",
        ["average", "level early", "noise warm-up", "lag warm-up", "noise settled", "lag settled"],
        rows,
        tuple(AVERAGES.index(kind) for kind in ("debiased_ewma", "slides")),
    )


def _along_horizons(settings: RunningAveragesConfig, tracking: Array, noise: Array) -> Table:
    rows: list[list[Cell]] = []
    for at, horizon in enumerate(settings.horizons):
        numbers = [
            of(noise, "debiased_ewma", "cosine", "settled")[:, at],
            of(noise, "window", "cosine", "settled")[:, at],
            of(tracking, "debiased_ewma", "cosine", "settled")[:, at],
            of(tracking, "window", "cosine", "settled")[:, at],
        ]
        rows.append([str(horizon), f"{1 / window(horizon):.3g}", *map(over_seeds, numbers)])
    return Table(
        "Settled, along horizons",
        f"At equal noise: a window of 2N - 1 examples beside an exponential average of horizon N, on a cosine of "
        f"period {settings.period:,}. The last two columns are squared tracking errors.",
        ["N", "(1-beta)/(1+beta)", "noise, EWMA", "noise, window", "lag, EWMA", "lag, window"],
        rows,
        (),
    )


TERMS = {
    "Horizon N": "beta = 1 - 1/N: an example's weight in the average is a third after about N more.",
    "Noise and lag": "The mean square error over draws is the sum of both: the variance of the average, and the square "
    "of its mean minus the signal.",
    "min(t, N) mean": "moves by 1/min(t, N) of the difference to each example, as on the slides: the plain mean of the "
    "first N examples, and then an exponential average. It is not the mean of the last N.",
    "EWMA from zero": "torch's momentum, RMSprop and Adam before its bias correction.",
}


def caption(settings: RunningAveragesConfig) -> str:
    return (
        f"Top: one draw (dots: the data, dotted line: the signal) and averages of horizon N = {settings.shown}. "
        "Bottom: what each leaves of the noise against its lag behind the cosine, one point a horizon (N = "
        f"{', '.join(map(str, settings.horizons))}, longer ones to the left), settled and in the first N examples; "
        f"lower and further left is better. Means over {len(settings.seeds)} seeds of {settings.draws} draws; "
        "vertical lines are 95% intervals over seeds, where they are larger than a point; lags that these do not tell "
        "from zero are left out. EWMA from zero, EWMA debiased and min(t, N) mean coincide once settled."
    )


def alternative(settings: RunningAveragesConfig, tracking: Array, noise: Array) -> str:
    at = settings.horizons.index(settings.shown)
    numbers = "; ".join(
        f"{LABELS[kind]}: noise {of(noise, kind, 'cosine', 'settled')[:, at].mean():.2g}, "
        f"lag {of(tracking, kind, 'cosine', 'settled')[:, at].mean():.2g}"
        for kind in AVERAGES
    )
    return f"Averages of noisy data, and noise against lag along horizons. Settled, at N = {settings.shown}: {numbers}."


STUDY = RunningAverages
