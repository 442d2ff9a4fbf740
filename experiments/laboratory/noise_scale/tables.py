"""The tables of noise_scale."""

from __future__ import annotations

from experiments.contest.tables import TERMS as OF_CONTEST
from experiments.contest.tables import tables as of_contest
from experiments.documents import Cell, Table
from experiments.laboratory.noise_scale.analysis import Analysis
from experiments.laboratory.noise_scale.measure import METHODS, WHOLE


def tables(found: Analysis) -> list[Table]:
    layers = [_layers(found, label) for label in found.settings.contestants]
    return [_critical(found), *layers, *of_contest(found.contest)]


def _critical(found: Analysis) -> Table:
    rows: list[list[Cell]] = []
    for label in found.settings.contestants:
        for target in found.settings.targets:
            least = found.least_steps(label, target)
            rows.append(
                [
                    f"{label}, {target:g} nats",
                    found.measured_size(label, target),
                    found.predicted_size(label, target),
                    found.ratio(label, target),
                    least,
                ]
            )
    return Table(
        title="Critical batch size",
        explanation="To reach a training loss: fitted to the steps of every batch size at its quickest learning rate; "
        f"told by the noise scale along the run of B = {found.settings.followed_batch_size}; and the steps at "
        "the largest batch size.",
        columns=["Method, loss", "Measured", "Told by the noise scale", "Ratio", "Steps at the largest B"],
        rows=rows,
        emphasised=(),
    )


def _layers(found: Analysis, label: str) -> Table:
    one = found.followed[label]
    rows: list[list[Cell]] = []
    for group in (WHOLE, *found.layers):
        ends = [found.scale_at(label, look, group) for look in (0, -1)]
        errors = [found.error(label, method, group) for method in METHODS]
        rows.append([group, *ends, found.correlation(label, group), *errors])
    return Table(
        title=f"Noise scale by layer: {label}",
        explanation=f"Over the training set after {one.examples[0]:,} and after {one.examples[-1]:,} examples; its "
        "correlation with the total along the run; and the relative error of it that one draw of "
        f"{found.settings.big} examples has, by the norms of examples and of shards of {found.settings.small}.",
        columns=["Parameters", "First", "Last", "Correlation", *(f"Error, {method}" for method in METHODS)],
        rows=rows,
        emphasised=(0,),
    )


TERMS = OF_CONTEST | {
    "Noise scale": "tr Sigma / |G|^2 of per-example gradients: the batch size whose gradient has as much noise as "
    "signal.",
    "Critical batch size": "B_crit in steps S = S_min (1 + B_crit / B) to a loss: there twice the least steps, and "
    "twice the least examples, are needed.",
    "Told by the noise scale": "Its mean along the run up to the loss, each step counted as the share 1 / (1 + N / B) "
    "of a step without noise that it is worth at the noise scale N.",
    "Quickest": "The learning rate with the fewest examples to the loss, a geometric mean over seeds, of those that "
    "bring every run to it: one that diverges, or ends above it, takes more than is known.",
}
