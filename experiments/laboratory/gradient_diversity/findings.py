"""Whether long gradients are wrong labels, whether they tell more than the loss, and how diverse gradients are."""

from __future__ import annotations

import numpy as np

from experiments.estimate import Finding, Verdict, geometric_mean, notes, over_seeds
from experiments.laboratory.gradient_diversity.analysis import Analysis
from experiments.laboratory.gradient_diversity.look import (
    DIFFERENT,
    ERROR,
    FORGETTING,
    LOSS,
    NORM,
    SAME,
    WRONG_TO_GIVEN,
    WRONG_TO_TRUE,
)
from experiments.laboratory.verdicts import both, within

PRECISE = 0.8  # of the examples with the longest gradients, as many as there are wrong labels
BY_HEART = 0.5  # of the wrong labels, from which on they are called learnt
ALIKE = 0.01  # of the area under the curve
BY_CHANCE = 0.6  # area under the curve, below which a score tells next to nothing; that of chance is 0.5
APART = 0.1  # of a cosine similarity


def findings(found: Analysis) -> list[Finding]:
    first, early, end = found.shares[0], found.early, len(found.examples) - 1
    return [
        *(_precise(found, share) for share in found.shares),
        *(_falls(found, share) for share in found.shares),
        *(_norm_against_loss(found, share, moment) for moment in (early, end) for share in found.shares),
        _error_norm(found, first),
        _initial(found, first),
        _forgetting(found, first),
        _same_class(found),
        _agreement_falls(found),
        _against_true_class(found, first),
        _diversity_grows(found),
        _wrong_labels_are_diverse(found, first),
        _batch_size(found),
        *notes([_most_precise(found, share) for share in found.shares]),
    ]


def when(found: Analysis, moment: int) -> str:
    epochs = found.settings.epochs[moment]
    return f"after {epochs:g} epoch{'' if epochs == 1 else 's'}" if epochs else "at the initial model"


def between(found: Analysis, first: int, last: int) -> str:
    epochs = found.settings.epochs
    return f"from epoch {epochs[first]:g} to {epochs[last]:g}"


def wrong(share: float) -> str:
    return f"{share:.0%} wrong labels"


def _precise(found: Analysis, share: float) -> Finding:
    precision = found.score(share, "found", NORM, found.early)
    return Finding(
        f"{wrong(share)}, {when(found, found.early)}: of as many of the longest gradients, at least {PRECISE:.0%} are "
        "wrong labels",
        within(precision, PRECISE, np.inf),
        f"The precision, which is the recall there, is {precision}; among twice as many are "
        f"{found.score(share, 'twice', NORM, found.early)} of the wrong labels. The area under the curve is "
        f"{found.score(share, 'area', NORM, found.early)}.",
    )


def _falls(found: Analysis, share: float) -> Finding:
    end = len(found.examples) - 1
    change = over_seeds(np.diff(found.quality[share, "found", NORM][:, [found.early, end]])[:, 0])
    learnt = found.at(share, "learnt", end)
    # What is not learnt by heart cannot show what becomes of that.
    judged: Verdict = "holds" if learnt.low >= BY_HEART else "cannot be judged"
    return Finding(
        f"{wrong(share)}: that precision falls once the wrong labels are learnt by heart",
        change.verdict(0) if judged == "holds" else judged,
        f"{between(found, found.early, end).capitalize()} it changes by {change}, to "
        f"{found.score(share, 'found', NORM, end)}. The model then predicts {learnt} of the wrong labels, and "
        f"the true one for {found.at(share, 'right', end)}, where it predicted "
        f"{found.at(share, 'learnt', found.early)} and {found.at(share, 'right', found.early)} before; held-out "
        f"accuracy goes from {found.at(share, 'test_accuracy', found.early)} to "
        f"{found.at(share, 'test_accuracy', end)}.",
    )


def _norm_against_loss(found: Analysis, share: float, moment: int) -> Finding:
    lower = found.above(share, "area", LOSS, NORM, moment)
    return Finding(
        f"{wrong(share)}, {when(found, moment)}: the gradient norm finds them better than the loss",
        lower.verdict(0),
        f"The area under the curve is {found.score(share, 'area', NORM, moment)} against "
        f"{found.score(share, 'area', LOSS, moment)}: the loss is {lower} above. The precision is "
        f"{found.score(share, 'found', NORM, moment)} against {found.score(share, 'found', LOSS, moment)}.",
    )


def _error_norm(found: Analysis, share: float) -> Finding:
    above = found.above(share, "area", ERROR, NORM, found.early)
    return Finding(
        f"{wrong(share)}, {when(found, found.early)}: the norm of the error alone (EL2N) finds them as well as that of "
        f"the gradient, within {ALIKE:g} of the area under the curve",
        within(above, -ALIKE, ALIKE),
        f"Its area is {above} above: {found.score(share, 'area', ERROR, found.early)} against "
        f"{found.score(share, 'area', NORM, found.early)}.",
    )


def _initial(found: Analysis, share: float) -> Finding:
    area = found.score(share, "area", NORM, 0)
    return Finding(
        f"{wrong(share)}: gradient norms {when(found, 0)} find some already: an area under the curve above {BY_CHANCE}",
        within(area, BY_CHANCE, np.inf),
        f"It is {area}, where chance gives 0.5.",
    )


def _forgetting(found: Analysis, share: float) -> Finding:
    end = len(found.examples) - 1
    lower = found.above(share, "area", NORM, FORGETTING, end)
    return Finding(
        f"{wrong(share)}, {when(found, end)}: how often an example was forgotten finds them better than its last "
        "gradient norm",
        lower.verdict(0),
        f"The area under the curve of forgetting events is {found.score(share, 'area', FORGETTING, end)}, that of the "
        f"norm is {lower} above; precisions are {found.score(share, 'found', FORGETTING, end)} and "
        f"{found.score(share, 'found', NORM, end)}.",
    )


def _same_class(found: Analysis) -> Finding:
    same, different = (found.pairs[0.0, kind] for kind in (SAME, DIFFERENT))
    worst = int((same - different).mean(axis=0).argmin())
    gap = over_seeds((same - different)[:, worst])
    products = [over_seeds(found.products[0.0, kind][:, worst]) for kind in (SAME, DIFFERENT)]
    return Finding(
        f"Gradients of a class agree at every moment: their cosine similarity is at least {APART:g} above that of "
        "different classes",
        within(gap, APART, np.inf),
        f"They are closest {when(found, worst)}: {found.cosine(0.0, SAME, worst)} against "
        f"{found.cosine(0.0, DIFFERENT, worst)}, {gap} apart. Inner products are then "
        f"{products[0]} and {products[1]}, in the mean.",
    )


def _agreement_falls(found: Analysis) -> Finding:
    end = len(found.examples) - 1
    change = over_seeds(np.diff(found.pairs[0.0, SAME][:, [found.early, end]])[:, 0])
    return Finding(
        "Gradients of a class agree less as training goes on",
        change.verdict(0),
        f"{between(found, found.early, end).capitalize()} their cosine similarity changes by {change}, to "
        f"{found.cosine(0.0, SAME, end)}.",
    )


def _against_true_class(found: Analysis, share: float) -> Finding:
    true, given = (found.cosine(share, kind, found.early) for kind in (WRONG_TO_TRUE, WRONG_TO_GIVEN))
    return Finding(
        f"{wrong(share)}, {when(found, found.early)}: a wrong label works against the right ones of its true class, "
        "and for those of the class it names",
        both(true.verdict(0), within(given, 0, np.inf)),
        f"The cosine similarity of its gradient with theirs is {true} and {given}; among right labels of a class it is "
        f"{found.cosine(share, SAME, found.early)}.",
    )


def _diversity_grows(found: Analysis) -> Finding:
    bound = found.numbers[0.0, "bound"]
    ratio = geometric_mean(bound[:, 0] / bound[:, -1])
    return Finding(
        "Gradient diversity grows along training",
        ratio.verdict(1),
        f"The initial model's batch-size bound n Delta, {geometric_mean(bound[:, 0])}, is {ratio} times that of the "
        f"last one, {geometric_mean(bound[:, -1])}.",
    )


def _wrong_labels_are_diverse(found: Analysis, share: float) -> Finding:
    right, other = (found.numbers[p, "bound"][:, found.early] for p in (0.0, share))
    ratio = geometric_mean(right / other)
    return Finding(
        f"{when(found, found.early).capitalize()}: wrong labels make gradients more diverse",
        ratio.verdict(1),
        f"Without them n Delta is {geometric_mean(right)}, {ratio} times the {geometric_mean(other)} with "
        f"{wrong(share)}.",
    )


def _batch_size(found: Analysis) -> Finding:
    bound = found.numbers[0.0, "bound"]
    worst = int(np.log(bound).mean(axis=0).argmin())
    least = geometric_mean(bound[:, worst])
    return Finding(
        f"The batch size of the runs, {found.batch_size}, is below the bound at every moment",
        within(least, found.batch_size, np.inf),
        f"The least n Delta is {least}, {when(found, worst)}.",
    )


def _most_precise(found: Analysis, share: float) -> str:
    told = []
    for score in (NORM, ERROR, LOSS, FORGETTING):
        best = int(found.quality[share, "found", score].mean(axis=0).argmax())
        told.append(f"{score} {found.score(share, 'found', score, best)} {when(found, best)}")
    return f"With {wrong(share)} the highest precisions are: {'; '.join(told)}."
