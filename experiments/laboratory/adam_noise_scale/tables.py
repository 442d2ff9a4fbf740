"""The tables of adam_noise_scale."""

from __future__ import annotations

from experiments.contest.tables import TERMS as OF_CONTEST
from experiments.contest.tables import tables as of_contest
from experiments.documents import Cell, Table
from experiments.laboratory.adam_noise_scale.analysis import KINDS, LAWFUL, Analysis


def tables(found: Analysis) -> list[Table]:
    return [_rates(found), _sizes(found), *of_contest(found.contest)]


def _rates(found: Analysis) -> Table:
    labels = found.contest.labels
    rows: list[list[Cell]] = [[str(B), *(found.lr(label, B) for label in labels)] for B in found.settings.batch_sizes]
    return Table(
        title="Tuned learning rates",
        explanation="Where the parabola through the best of them and its neighbours is lowest. Of R = 1 it is lr0 B0, "
        "of an example times the batch size of tuning.",
        columns=["B", *labels],
        rows=rows,
        emphasised=(),
    )


def _sizes(found: Analysis) -> Table:
    rows: list[list[Cell]] = [
        [label, found.fitted_size(label), *(found.size(label, kind) for kind in KINDS)] for label in LAWFUL
    ]
    return Table(
        title="B_noise",
        explanation="Fitted to the tuned learning rates; and measured along the run of B = "
        f"{found.settings.followed_batch_size}, over the training set and from the batches as they come.",
        columns=["Method", "Fitted", *(kind.capitalize() for kind in KINDS)],
        rows=rows,
        emphasised=(),
    )


TERMS = OF_CONTEST | {
    "B_noise": "Where the best learning rate of lr_max / (1/2 (sqrt(B_noise/B) + sqrt(B/B_noise))) is highest.",
    "With the Hessian": "pi/2 sum H_ii / sum over i != j of s_i s_j H_ij, s_i = mu_i / sigma_i: mean and standard "
    "deviation of examples' gradients, element by element. Sums over the run, as of one learning rate for all of it.",
    "Any B": "The same without its approximation for small batches: where sum mu_i e_i / (sum H_ii + sum over i != j "
    "of e_i e_j H_ij) is highest, e_i = erf(sqrt(B/2) s_i); from 1 to 4,096.",
    "Without the Hessian, online": "pi/2 sum sigma_i^2 / sum mu_i^2, over the training set, and from the batches of "
    "the run, where both are estimated without bias.",
    "Sign of the batch": "Adam with betas of 0: a step of lr in every element, for which the law is derived.",
}
