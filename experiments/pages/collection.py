"""The page of any runs: where they ended, their curves, what they differ in, and where they were made."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
from omegaconf import OmegaConf

from experiments import checkpoint
from experiments.pages import heat, html
from experiments.pages.appearance import MOST, appearances, distinct
from experiments.pages.axes import Scale
from experiments.pages.chart import MOST_BANDS, Line, chart
from experiments.pages.curves import METRICS, curve, layers, metrics
from experiments.pages.groups import ABSENT, Collection, Group, states
from experiments.pages.summary import FINAL, differences, final_values, findings, ranked
from experiments.pages.title import title
from experiments.pages.transfer import transfer
from experiments.tracker import how_to_look

LINEAR = ("accuracy/", "optimizer/", "speed/")  # metrics that are read on a linear axis first
MOST_CHARTS = 4  # of layers: each is of one group, with a line a layer
CEILING = 2  # of losses, in units of the initial model's: one that explodes would leave one line to all the others


def page(collection: Collection, paths: Sequence[Path]) -> str:
    """paths: where the runs were found."""
    sections = [
        ("Curves", _curves(collection, drawn(collection))),
        ("Findings", html.findings(found) if (found := findings(collection)) else ""),
        ("Groups", _groups(collection)),
        ("Over batch sizes", _over_batch_sizes(collection)),
        ("Heat maps", _heat(collection)),
        ("Layers", _layers(collection)),
        ("Configuration and versions", _setting(collection)),
        ("Look further", html.commands("Commands", _further(paths, collection))),
    ]
    return html.page(
        title=title(collection, paths),
        introduction=html.paragraph(_introduction(collection)),
        body="\n".join(html.section(heading, content) for heading, content in sections if content),
        footer=f"Made by gradstats from {_counted(len(collection.runs), 'run')}.",
    )


def drawn(collection: Collection) -> list[Group]:
    """All groups, or as many as can be told apart, those with the lowest final training loss; in their order."""
    chosen = {found.key for found in _best_first(collection)[:MOST]}
    return [found for found in collection.groups if found.key in chosen]


def _best_first(collection: Collection) -> list[Group]:
    """Those without a final value last."""
    return list({found.key: found for found in [*ranked(collection), *collection.groups]}.values())


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _introduction(collection: Collection) -> str:
    runs = collection.runs
    if len(runs) == 1:
        return f"One run, {runs[0].status}."
    told = f"{len(runs)} runs: {states(runs)}."
    if len(collection.groups) == 1:
        return f"{told} They differ only in their seed."
    return (
        f"{told} They are {len(collection.groups)} groups, told apart by {', '.join(collection.telling)}; "
        "the runs of a group differ only in their seed."
    )


def _curves(collection: Collection, groups: Sequence[Group]) -> str:
    looks = appearances(groups, collection.telling)
    starts = [line.mean[0] for found in groups if (line := curve(found, "loss/train")) is not None]
    ceiling = CEILING * max(starts, default=np.inf)
    charts = []
    cut = False
    for metric in metrics(groups):
        lines = [
            Line(found.key, found.label or "all runs", line, look)
            for found, look in zip(groups, looks, strict=True)
            if (line := curve(found, metric)) is not None
        ]
        if lines:
            scale: Scale = "linear" if metric.startswith(LINEAR) else "log"
            highest = ceiling if metric.startswith("loss/") else np.inf
            charts.append((metric, chart(metric, METRICS.get(metric, metric), lines, scale, highest)))
            cut |= any((line.curve.high > highest).any() for line in lines)
    if not charts:
        return html.paragraph("The runs have logged nothing yet.")
    explanation = ""
    if len(collection.runs) > 1:
        explanation = (
            "A line is the mean over the seeds of a group, up to where the first of them ends, in a band from the "
            "lowest to the highest seed. Numbers are those at the end of the line, the band's in brackets."
        )
    if len(groups) > MOST_BANDS:
        explanation += " Of so many groups the band is shown of the one that is pointed at."
    if cut:
        explanation += f" Losses above {CEILING} times the initial model's are cut off."
    if left_out := len(collection.groups) - len(groups):
        explanation += (
            f" Drawn are the {len(groups)} groups with the lowest final training loss; "
            f"the {left_out} others are in the tables."
        )
    return (
        html.paragraph(explanation, "muted")
        + _controls([metric for metric, _ in charts])
        + "\n".join(drawing for _, drawing in charts)
    )


def _controls(names: Sequence[str]) -> str:
    """Shown only where the script runs that they need."""
    options = "".join(f'<option value="{escape(name)}">{escape(METRICS.get(name, name))}</option>' for name in names)
    scales = "".join(
        f'<div role="group" aria-label="{name}"><span>{name}</span>'
        + "".join(
            f'<button type="button" data-axis="{axis}" data-scale="{scale}" aria-pressed="false">{scale}</button>'
            for scale in ("log", "linear")
        )
        + "</div>"
        for axis, name in (("y", "vertical axis"), ("x", "examples"))
    )
    metric = f'<label for="metric">metric</label><select id="metric">{options}</select>'
    return f'<div class="controls">{metric}{scales}</div>\n'


def _groups(collection: Collection) -> str:
    keys = [found.key for found in collection.groups]
    tables = [html.table(final_values(collection, collection.groups), keys)]
    if collection.differing:
        tables.append(html.table(differences(collection), keys))
    return "\n".join(tables)


def _over_batch_sizes(collection: Collection) -> str:
    found = transfer(collection)
    if found is None:
        return ""
    return html.table(found.table) if found.table else html.paragraph(f"No score or regret: {found.reason}.", "muted")


def _heat(collection: Collection) -> str:
    maps = heat.heat_maps(collection)
    if not maps:
        return ""
    first, *others = (html.columns(heat.drawn(found, metric, name) for found in maps) for metric, name in FINAL.items())
    return first + "\n".join(
        html.details(name, content) for name, content in zip(list(FINAL.values())[1:], others, strict=True)
    )


def _layers(collection: Collection) -> str:
    having = [found for found in _best_first(collection) if layers(found)]
    if not having:
        return ""
    charts = []
    for found in having[:MOST_CHARTS]:
        names = layers(found)
        curves = [curve(found, f"layers/{name}/signal_to_noise") for name in names]
        lines = [
            Line(f"layer-{name}", f"layer {name}", line, look)
            for name, line, look in zip(names, curves, distinct(len(names)), strict=True)
            if line is not None
        ]
        charts.append(chart(f"layers of {found.key}", found.label or "Signal-to-noise by layer", lines[:MOST], "log"))
    explanation = (
        "Signal-to-noise of each layer's gradient, |G|^2 / tr Sigma: 1 over the layer's noise scale in examples."
    )
    if len(having) > MOST_CHARTS:
        explanation += (
            f" Of {len(having)} groups that logged it, the {MOST_CHARTS} with the lowest final training loss."
        )
    return html.paragraph(explanation, "muted") + html.columns(charts)


def _setting(collection: Collection) -> str:
    runs = collection.runs
    names = dict.fromkeys(name for run in runs for name in run.machine)
    machines = {name: "; ".join(dict.fromkeys(str(run.machine.get(name, ABSENT)) for run in runs)) for name in names}
    common = collection.common()
    configuration = OmegaConf.to_yaml(OmegaConf.create(common)).splitlines()
    directories = [f"{run.directory}    # {run.status}" for run in runs]
    return "\n".join(
        [
            html.properties("Versions", machines) if machines else "",
            html.details(
                "Configuration" if len(collection.groups) == 1 else "What all groups have in common",
                html.commands("Configuration", configuration),
            ),
            html.details("Directories", html.commands("Directories", directories)),
        ]
    )


def _further(paths: Sequence[Path], collection: Collection) -> list[str]:
    lines = [f"python -m experiments.report {shlex.join(map(str, paths))}    # this page again"]
    if (tracked := next((run for run in collection.runs if how_to_look(run.directory)), None)) is not None:
        folder = shlex.quote(str(tracked.directory / "wandb"))
        lines.append(f"wandb leet {folder}    # all that a run logged, in the terminal")
    stopped = (run for run in collection.runs if run.status == "unfinished" and checkpoint.find(run.directory))
    if (run := next(stopped, None)) is not None:
        lines.append(f"# the command that began it, with resume=true directory={run.directory}, continues a run")
    return lines
