"""The tables of a study, once: the terminal, the report and W&B all show these."""

from __future__ import annotations

from experiments.documents import Cell, Table
from experiments.estimate import listed
from experiments.invariance.analysis import Analysis
from experiments.invariance.findings import estimate, named_target


def tables(analysis: Analysis) -> list[Table]:
    return [_summary(analysis), _matched(analysis), _regret(analysis, "training"), _regret(analysis, "test")]


def _summary(analysis: Analysis) -> Table:
    home = analysis.comparison.tuning_batch_size
    return _table(
        analysis,
        "Every optimizer at its tuned learning rate",
        f"Tuned on the training loss at B = {home}. Final loss and accuracy are those at B = {home}; the score is over "
        f"B in {listed(analysis.comparison.score_batch_sizes)}; regret is the mean over B in "
        f"{listed(analysis.grid.batch_sizes)}. "
        f"Brackets: 95% bootstrap intervals over {len(analysis.grid.seeds)} seeds.",
        ["tuned lr", "score", "final loss", "test accuracy (%)", "transfer regret", "worst loss over B"],
        [
            [
                f"{analysis.grid.lr[m, analysis.tuned[m]]:.3g}",
                estimate(analysis, "score", m),
                estimate(analysis, "final_loss", m),
                estimate(analysis, "test_accuracy", m, percent=True),
                estimate(analysis, "mean_regret", m),
                estimate(analysis, "worst_loss", m),
            ]
            for m in _order(analysis)
        ],
    )


def _matched(analysis: Analysis) -> Table:
    targets = range(len(analysis.point.targets))
    return _table(
        analysis,
        "Score at matched final loss",
        "Interpolated in ln(loss) along each optimizer's learning rates at and below its tuned one. A dash: the "
        "optimizer does not reach that loss on this branch. Ratio: to the best baseline at that loss.",
        [c for t in targets for c in (f"at {analysis.point.targets[t]:.3g}, {named_target(analysis, t)}", "ratio")],
        [
            [estimate(analysis, measure, m, t) for t in targets for measure in ("matched_score", "ratio")]
            for m in _order(analysis)
        ],
    )


def _regret(analysis: Analysis, kind: str) -> Table:
    prefix = {"training": "", "test": "test_"}[kind]
    rates = ", ".join(
        f"{analysis.grid.lr[analysis.reference, rate]:.3g} at {size}"
        for size, rate in zip(analysis.grid.batch_sizes, analysis.reference_tuned, strict=True)
    )
    return _table(
        analysis,
        f"Transfer regret on the {kind} loss",
        f"Final {kind} loss at each batch size, with the learning rate tuned at "
        f"B = {analysis.comparison.tuning_batch_size}, minus that of {analysis.reference_label}, tuned at that "
        f"batch size on the training loss (lr {rates}).",
        [*(f"B = {size}" for size in analysis.grid.batch_sizes), "mean"],
        [
            [
                *(estimate(analysis, f"{prefix}regret", m, b) for b in range(len(analysis.grid.batch_sizes))),
                estimate(analysis, f"mean_{prefix}regret", m),
            ]
            for m in _order(analysis)
        ],
    )


def _order(analysis: Analysis) -> list[int]:
    return [*analysis.ours, *analysis.baselines, *analysis.kin]


def _table(analysis: Analysis, title: str, explanation: str, columns: list[str], cells: list[list[Cell]]) -> Table:
    rows = [[analysis.grid.labels[m], *row] for m, row in zip(_order(analysis), cells, strict=True)]
    return Table(title, explanation, ["optimizer", *columns], rows, tuple(range(len(analysis.ours))))
