"""The tables of gradient_diversity."""

from __future__ import annotations

from experiments.documents import Cell, Table
from experiments.estimate import geometric_mean
from experiments.laboratory.gradient_diversity.analysis import Analysis
from experiments.laboratory.gradient_diversity.findings import wrong
from experiments.laboratory.gradient_diversity.look import KINDS, NORM, SCORES


def tables(found: Analysis) -> list[Table]:
    return [*(table(found, share) for share in found.shares for table in (_precision, _area)), _similarity(found)]


def _epochs(found: Analysis, moment: int) -> str:
    return f"{found.settings.epochs[moment]:g}"


def _precision(found: Analysis, share: float) -> Table:
    rows: list[list[Cell]] = [
        [
            _epochs(found, t),
            *(found.score(share, "found", score, t) for score in SCORES),
            found.score(share, "twice", NORM, t),
            found.at(share, "learnt", t),
        ]
        for t in range(len(found.examples))
    ]
    return Table(
        title=f"Precision, {wrong(share)}",
        explanation="Of each score; of the wrong labels, the share that is found among twice as many of the longest "
        "gradients, and the share that the model predicts.",
        columns=["Epochs", "Norm", "EL2N", "Loss", "Forgetting", "Norm, twice as many", "Learnt"],
        rows=rows,
        emphasised=(found.early,),
    )


def _area(found: Analysis, share: float) -> Table:
    rows: list[list[Cell]] = [
        [_epochs(found, t), *(found.score(share, "area", score, t) for score in SCORES)]
        for t in range(len(found.examples))
    ]
    return Table(
        title=f"Area under the curve, {wrong(share)}",
        explanation="Of each score.",
        columns=["Epochs", "Norm", "EL2N", "Loss", "Forgetting"],
        rows=rows,
        emphasised=(found.early,),
    )


def _similarity(found: Analysis) -> Table:
    main, shares = found.shares[0], found.settings.shares
    rows: list[list[Cell]] = [
        [
            _epochs(found, t),
            *(found.cosine(main if kind.startswith("wrong") else 0.0, kind, t) for kind in KINDS),
            *(geometric_mean(found.numbers[share, "bound"][:, t]) for share in shares),
        ]
        for t in range(len(found.examples))
    ]
    return Table(
        title="Similarity and diversity of gradients",
        explanation="Mean cosine similarity of the gradients of two examples: of right labels only, of the same class "
        f"and of different ones; and with {wrong(main)}, of a wrong label and right ones of its true class, and of the "
        "class it names. n Delta by the share of wrong labels.",
        columns=[
            "Epochs",
            "Same class",
            "Different",
            "Wrong, true",
            "Wrong, named",
            *(f"n Delta, {share:.0%}" for share in shares),
        ],
        rows=rows,
        emphasised=(found.early,),
    )


TERMS = {
    "Wrong labels": "Training labels that are moved to another class, never the true one; drawn anew for each seed.",
    "Precision": "Of as many examples of the highest scores as there are wrong labels, the share that has one: the "
    "recall is the same there.",
    "Area": "Under the receiver operating characteristic: the chance that a wrong label has a higher score than a "
    "right one. Chance gives 0.5.",
    "Gradient norm, error norm": "||g_b|| at one moment of one run (GraNd), and ||softmax(z) - onehot(y)|| (EL2N; Paul "
    "et al. 2021, who average both over initial models).",
    "Forgetting events": "How often an example that was predicted right at the end of an epoch is predicted wrong at "
    "the next; more than any for one that was never right (Toneva et al. 2019, at every presentation).",
    "n Delta": "n sum ||g_b||^2 / ||sum g_b||^2 over all n training examples: up to such a batch size a larger batch "
    "loses little (Yin et al. 2018).",
    "Learnt": "Wrong labels that the model predicts.",
}
