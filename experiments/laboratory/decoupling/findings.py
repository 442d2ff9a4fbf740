"""Whether the best learning rate stays."""

from __future__ import annotations

import numpy as np

from experiments.estimate import Finding, notes
from experiments.laboratory.decoupling.analysis import AXES, Analysis, HeatMap

BAR = 0.5  # octaves


def findings(analysis: Analysis) -> list[Finding]:
    return [*(_stays(axis, **pair) for axis, pair in analysis.maps.items()), *_notes(analysis)]


def _stays(axis: str, torch: HeatMap, examples: HeatMap) -> Finding:
    factor = f"a factor {examples.values[-1] / examples.values[0]:g} in {AXES[axis].label}"
    verdict = examples.drift.verdict(BAR)
    if examples.edges and verdict == "holds":  # an optimum beyond the grid can only lie further away
        verdict = "cannot be judged"
    return Finding(
        f"The best lr0 drifts by at most {BAR:g} octaves over {factor}",
        verdict,
        f"In units of examples the best learning rate moves over {examples.drift} octaves (slope {examples.slope}); in "
        f"torch's units over {torch.drift} (slope {torch.slope}). {_largest_move(examples)}",
    )


def _largest_move(found: HeatMap) -> str:
    """Where a drift comes from one end of the axis, this says so."""
    moves = np.diff(np.log2([lr.value for lr in found.best_lr]))
    at = int(np.abs(moves).argmax())
    return (
        f"Its largest move between neighbours, by {moves[at]:+.2f} octaves, is from {found.values[at]:g} to "
        f"{found.values[at + 1]:g}."
    )


def _notes(analysis: Analysis) -> list[Finding]:
    told = [
        f"{AXES[axis].label}, {units}: at {', '.join(f'{value:g}' for value in found.edges)} the best learning rate is "
        "at an edge of the grid, and the drift may be larger."
        for axis, pair in analysis.maps.items()
        for units, found in pair.items()
        if found.edges
    ]
    if analysis.diverged:
        told.append(
            f"{analysis.diverged} of {analysis.runs} runs diverged, and count with the loss of their initial model."
        )
    return notes(told)
