"""Score and transfer regret of runs that nobody planned as a study, where they form the grid that a study would."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from experiments.documents import Cell, Table
from experiments.invariance.analysis import Analysis, Comparison, analyse
from experiments.invariance.findings import estimate
from experiments.pages.groups import Collection, Group, label
from experiments.record import Record

REFERENCE = "adam"  # what regret is measured against, where it is among the runs


@dataclass(frozen=True)
class Transfer:
    """reason: why there is no table."""

    table: Table | None
    reason: str = ""


def transfer(collection: Collection) -> Transfer | None:
    """None if there is one batch size only. Needs each learning rate, batch size and seed with each of the others.

    A method is an optimizer with all its settings but the learning rate.
    """
    sizes = sorted({group.settings.get("train.batch_size", 0) for group in collection.groups})
    if len(sizes) < 2:
        return None
    if others := [key for key in collection.telling if key != "train.batch_size" and not _is_of_method(key)]:
        return Transfer(None, f"the groups also differ in {', '.join(others)}: make a page of runs that do not")
    if unfinished := sum(run.status == "unfinished" for run in collection.runs):
        return Transfer(None, f"{unfinished} of the runs have not ended")
    records = [record for group in collection.groups for record in _records(group, collection)]
    reference = next((r.method for r in records if json.loads(r.method)[0] == REFERENCE), records[0].method)
    try:
        analysis = analyse(
            records,
            Comparison(
                ours=(),
                reference=reference,
                tuning_batch_size=_tuning_batch_size(collection, sizes),
                score_batch_sizes=tuple(sizes),
            ),
        )
    except ValueError as error:
        return Transfer(None, str(error))
    return Transfer(_table(analysis))


def _is_of_method(key: str) -> bool:
    return key.startswith("optimizer.")


def _records(group: Group, collection: Collection) -> list[Record]:
    """With the method as JSON, its name first, and as its label what tells it from the other methods."""
    keys = [key for key in collection.differing if _is_of_method(key) and key != "optimizer.lr"]
    method = json.dumps([group.settings["optimizer.name"], *(group.settings.get(key) for key in keys)])
    telling = [key for key in collection.telling if key in keys]
    name = label(group.settings, telling) or group.settings["optimizer.label"]
    return [dataclasses.replace(run.record, method=method, label=name) for run in group.runs if run.record is not None]


def _tuning_batch_size(collection: Collection, sizes: Sequence[int]) -> int:
    """The one for which the settings were meant, if all were meant for one that was run, or else the middle one."""
    meant = {group.settings.get("optimizer.batch_size") for group in collection.groups}
    middle = sizes[len(sizes) // 2]
    return next((size for size in sizes if meant == {size}), middle)


def _table(analysis: Analysis) -> Table:
    grid, home = analysis.grid, analysis.comparison.tuning_batch_size
    measures = {
        "score": "score",
        "final_loss": f"final loss at B = {home}",
        "mean_regret": "mean regret",
        "mean_test_regret": "mean regret, test loss",
    }
    rows: list[list[Cell]] = [
        [
            grid.labels[m],
            f"{grid.lr[m, analysis.tuned[m]]:.3g}",
            *(estimate(analysis, measure, m) for measure in measures),
            *(estimate(analysis, "regret", m, b) for b in range(len(grid.batch_sizes))),
        ]
        for m in range(len(grid.methods))
    ]
    columns = ["optimizer", "tuned lr", *measures.values(), *(f"regret at B = {size}" for size in grid.batch_sizes)]
    return Table("Score and transfer regret", _explanation(analysis), columns, rows, ())


def _explanation(analysis: Analysis) -> str:
    grid, rates = analysis.grid, analysis.grid.lr.shape[1]
    home, several = analysis.comparison.tuning_batch_size, rates > 1
    tuned = f"the learning rate, of {rates}, with the lowest final training loss at B = {home}"
    sentences = [
        f"Each optimizer with {tuned if several else 'its one learning rate'}.",
        "Score: the standard deviation over B of ln(training loss) at the same number of examples, 0 for curves that "
        "coincide; it tends to 0 with the learning rate too.",
        f"Regret: final loss minus that of {analysis.reference_label}"
        + (", whose learning rate is tuned at each B separately." if several else "."),
    ]
    if np.isfinite(analysis.seed_floor).all():
        sentences.insert(2, f"Between seeds in place of B it is {analysis.seed_floor.min():.2g} or more.")
    if grid.diverged.any():
        sentences.append("A run that diverged counts with the loss of its initial model.")
    if len(grid.seeds) > 1:
        sentences.append(f"Brackets: 95% bootstrap intervals over {len(grid.seeds)} seeds.")
    return " ".join(sentences)
