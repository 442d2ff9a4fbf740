"""What a study says about each claim, in one sentence with its numbers, whichever way it comes out."""

from __future__ import annotations

import numpy as np

from experiments.estimate import CONFIDENCE, Estimate, Finding, at_edge, listed, notes
from experiments.invariance.analysis import Analysis, best_baseline, lowest, out_of_reach, scores

LARGEST_RATIO = 1 / 3
LARGEST_ACCURACY_GAP = 0.01


def estimate(analysis: Analysis, measure: str, *index: int, percent: bool = False) -> Estimate:
    """One number of ``Measures``, by its name and position. One seed has no interval."""
    value, low, high = (float(getattr(m, measure)[index]) for m in (analysis.point, analysis.low, analysis.high))
    if len(analysis.grid.seeds) == 1:
        low = high = np.nan
    return Estimate(value, low, high, percent)


def findings(analysis: Analysis) -> list[Finding]:
    bars = [
        finding
        for method in analysis.ours
        for finding in (
            *(_matched_score(analysis, method, target) for target in range(len(analysis.point.targets))),
            _regret(analysis, method),
            _accuracy(analysis, method),
        )
    ]
    return [*bars, *_notes(analysis)]


def named_target(analysis: Analysis, target: int) -> str:
    factor = analysis.comparison.loss_targets[target]
    times = {1.0: "", 2.0: "twice "}.get(factor, f"{factor:g} times ")
    return f"{times}the final loss of {analysis.reference_label}"


def _matched_score(analysis: Analysis, method: int, target: int) -> Finding:
    label, loss = analysis.grid.labels[method], analysis.point.targets[target]
    bar = f"{label}: score at most a third of the best baseline's, at {named_target(analysis, target)}"
    if reason := out_of_reach(analysis, method, target):
        return Finding(bar, "cannot be judged", f"It does not reach a final loss of {loss:.3g}: {reason}.")
    best = lowest(analysis.point.matched_score[:, target], analysis.baselines)
    if best is None:
        return Finding(bar, "cannot be judged", f"No baseline reaches a final loss of {loss:.3g}.")
    ratio = estimate(analysis, "ratio", method, target, percent=True)
    sentence = (
        f"Over B in {listed(analysis.comparison.score_batch_sizes)}, at a final loss of {loss:.3g}, its score is "
        f"{estimate(analysis, 'matched_score', method, target)}, and that of the best baseline "
        f"({analysis.grid.labels[best]}) is {estimate(analysis, 'matched_score', best, target)}: "
        f"{ratio} per cent of it."
    )
    for other in analysis.kin:
        score = estimate(analysis, "matched_score", other, target)
        reached = score if np.isfinite(score.value) else "none, since it does not reach that loss"
        sentence += (
            f" That of {analysis.grid.labels[other]}, which averages the same squares by another road: {reached}."
        )
    verdict = ratio.verdict(LARGEST_RATIO)
    if (share := analysis.reachable[method, target]) < 1:
        sentence += f" Intervals are over the {share:.0%} of resamples that reach this loss"
        if share < CONFIDENCE:  # with the others the interval could lie anywhere
            verdict = "cannot be judged"
            sentence += ", too few to judge by"
        sentence += "."
    return Finding(bar, verdict, sentence + _beyond(ratio, LARGEST_RATIO))


def _regret(analysis: Analysis, method: int) -> Finding:
    point, labels = analysis.point, analysis.grid.labels
    best = analysis.baselines[int(point.mean_regret[analysis.baselines].argmin())]
    margin = estimate(analysis, "regret_margin", method)
    sentence = (
        f"Over B in {listed(analysis.grid.batch_sizes)} its mean transfer regret is "
        f"{estimate(analysis, 'mean_regret', method)}, and the lowest of a baseline ({labels[best]}) is "
        f"{estimate(analysis, 'mean_regret', best)}: a difference of {margin}. On the test loss it is "
        f"{estimate(analysis, 'mean_test_regret', method)} against {estimate(analysis, 'mean_test_regret', best)}."
    )
    bar = f"{labels[method]}: mean transfer regret below every baseline's"
    return Finding(bar, margin.verdict(0), sentence + _beyond(margin, 0))


def _accuracy(analysis: Analysis, method: int) -> Finding:
    label = analysis.grid.labels[method]
    gap = estimate(analysis, "accuracy_gap", method, percent=True)
    sentence = (
        f"At B = {analysis.comparison.tuning_batch_size} its test accuracy is "
        f"{estimate(analysis, 'test_accuracy', method, percent=True)}%, and that of {analysis.reference_label} is "
        f"{estimate(analysis, 'test_accuracy', analysis.reference, percent=True)}%: a difference of {gap} points."
    )
    bar = f"{label}: test accuracy at most 1 point below that of {analysis.reference_label}"
    verdict = Estimate(-gap.value, -gap.high, -gap.low).verdict(LARGEST_ACCURACY_GAP)
    return Finding(bar, verdict, sentence + _beyond(gap, -LARGEST_ACCURACY_GAP))


def _notes(analysis: Analysis) -> list[Finding]:
    grid, point, method = analysis.grid, analysis.point, analysis.ours[0]
    told = []
    if np.isfinite(floor := analysis.seed_floor[method]):
        told.append(
            f"Seed floor: at one batch size, runs of {grid.labels[method]} that differ only in their seed have a score "
            f"of {floor:.3g}; over batch sizes it is {point.score[method]:.3g}."
        )
    if len(analysis.comparison.score_batch_sizes) > 2:
        told += [_limit(analysis, method), _range(analysis, method)]
    if grid.diverged.any():
        counts = grid.diverged.sum(axis=(1, 2, 3))
        table = ", ".join(f"{label} {count}" for label, count in zip(grid.labels, counts, strict=True) if count)
        told.append(
            f"{grid.diverged.sum()} of {grid.diverged.size} runs diverged ({table}); from there on they count with the "
            "loss of their initial model."
        )
    last = grid.lr.shape[1] - 1
    told += at_edge("lr", [grid.labels[m] for m, rate in enumerate(analysis.tuned) if rate in (0, last)])
    if sizes := [
        size for size, rate in zip(grid.batch_sizes, analysis.reference_tuned, strict=True) if rate in (0, last)
    ]:
        told.append(
            f"The reference, {analysis.reference_label} tuned at each batch size, has its best lr at an edge of "
            f"the grid at B in {listed(sizes)}: transfer regret may be underestimated there."
        )
    return notes(told)


def _limit(analysis: Analysis, method: int) -> str:
    """Without which batch size a method's score is lowest."""
    grid, sizes, best = analysis.grid, analysis.comparison.score_batch_sizes, best_baseline(analysis)
    every = np.arange(len(grid.methods))
    without = {size: scores(grid, [other for other in sizes if other != size])[every, analysis.tuned] for size in sizes}
    left_out = min(sizes, key=lambda size: without[size][method])
    ours, other = (f"{without[left_out][m]:.3g} instead of {analysis.point.score[m]:.3g}" for m in (method, best))
    return (
        f"Of all batch sizes, B = {left_out} adds most to the score: at the tuned lr, without it, that of "
        f"{grid.labels[method]} is {ours}, and that of {grid.labels[best]} {other}."
    )


def _range(analysis: Analysis, method: int) -> str:
    """How far invariance reaches: the score over the smallest two batch sizes, three, and so on."""
    sizes, every = sorted(analysis.comparison.score_batch_sizes), np.arange(len(analysis.grid.methods))
    up_to = {sizes[i]: scores(analysis.grid, sizes[: i + 1])[every, analysis.tuned] for i in range(1, len(sizes))}
    ours = ", ".join(f"{score[method]:.3g} up to {size}" for size, score in up_to.items())
    lowest = ", ".join(f"{score[analysis.baselines].min():.3g}" for score in up_to.values())
    return (
        f"From B = {sizes[0]} on, at the tuned lr, the score of {analysis.grid.labels[method]} is {ours}; the lowest "
        f"of a baseline's is {lowest}."
    )


def _beyond(value: Estimate, bar: float) -> str:
    return " The interval reaches across the bar." if value.low <= bar < value.high else ""
