"""A saved W&B workspace for the runs of these experiments: what to look at first, against examples seen.

python -m experiments.workspace --entity ENTITY --project PROJECT
python -m experiments.workspace --entity ENTITY --project PROJECT --dry-run     what would be saved, as JSON; no account
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from experiments.errors import UserError, command_line
from experiments.tracker import AXIS

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Section, Workspace

NAME = "gradstats"
COLUMNS = (
    "summary:status",
    "summary:examples",
    "summary:final/loss/train",
    "summary:final/loss/test",
    "summary:final/accuracy/test",
    "summary:best/loss/test",
    "summary:step_lr",
    "summary:worst_layer/name",
    "summary:seconds",
)


def build(entity: str, project: str) -> Workspace:
    """The workspace, not yet saved, without network or account. Raises UserError where its package is missing."""
    try:
        # Here: the package is an extra, and importing it takes longer than a short run.
        from wandb_workspaces import expr, workspaces
    except ImportError as error:
        raise UserError(f"a workspace needs wandb-workspaces: pip install 'gradstats[workspace]' ({error})") from error
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=NAME,
        sections=sections(),
        settings=workspaces.WorkspaceSettings(x_axis=AXIS, smoothing_type="none"),
        # A group is a study, a sweep or a search; runs of their own stand together in one without a name.
        runset_settings=workspaces.RunsetSettings(groupby=[expr.Metric("Group")], pinned_columns=list(COLUMNS)),
        # Layers, histograms and tables of studies have names that no list here could know: they follow below.
        auto_generate_panels=True,
    )


def sections() -> list[Section]:
    from wandb_workspaces.reports.v2 import Config, MediaBrowser, ScatterPlot, SummaryMetric, WeavePanelSummaryTable

    final = SummaryMetric("final/loss/train")
    return [
        section("Loss", line("loss/train", log=True), line("loss/test", log=True), line("loss/batch", log=True)),
        section("Accuracy", line("accuracy/train"), line("accuracy/test")),
        section(
            "Noise scale and worst layer",
            line("gradient/noise_scale", log=True),
            line("worst_layer/signal_to_noise", log=True),
            line("gradient/norm", log=True),
        ),
        section(
            "Signal-to-noise by layer (tracker.detail=true)",
            line(regex="layers/.*/signal_to_noise", title="signal-to-noise", log=True),
            line(regex="layers/.*/gradient_norm", title="gradient norm", log=True),
            WeavePanelSummaryTable(table_name="hardest examples"),
        ),
        section(
            "Optimizer",
            line("optimizer/lr"),
            ScatterPlot(
                title="final loss against the lr of a step", x=SummaryMetric("step_lr"), y=final, log_x=True, log_y=True
            ),
            ScatterPlot(
                title="final loss against batch size", x=Config("train.batch_size"), y=final, log_x=True, log_y=True
            ),
        ),
        section("Speed", line("speed/examples_per_second")),
        section(
            "Studies and searches",
            WeavePanelSummaryTable(table_name="Findings"),
            WeavePanelSummaryTable(table_name="Trials"),
            MediaBrowser(title="figures", media_keys=["Figure"], num_columns=1),
        ),
    ]


def section(name: str, *panels: Any) -> Section:
    from wandb_workspaces.workspaces import Section, SectionLayoutSettings, SectionPanelSettings

    # A section's own settings come before those of the workspace, and so must say the same.
    settings = SectionPanelSettings(x_axis=AXIS, smoothing_type="none")
    layout = SectionLayoutSettings(columns=3, rows=1)
    return Section(name=name, panels=list(panels), is_open=True, panel_settings=settings, layout_settings=layout)


def line(*metrics: str, regex: str | None = None, title: str | None = None, log: bool = False) -> Any:
    """Of a group, its mean and the range over its runs."""
    from wandb_workspaces.reports.v2 import LinePlot

    return LinePlot(
        title=title or ", ".join(metrics),
        x=AXIS,
        y=list(metrics),
        metric_regex=regex,
        log_y=log,
        smoothing_type="none",
        groupby_aggfunc="mean",
        groupby_rangefunc="minmax",
    )


def as_json(workspace: Workspace) -> str:
    """What `save` sends: the package has no public form of it."""
    text: str = workspace._model.model_dump_json(by_alias=True, exclude_none=True, indent=1)
    return text


def save(workspace: Workspace) -> None:
    """Raises UserError where W&B cannot be reached, or refuses."""
    try:
        workspace.save()
    except Exception as error:  # wandb raises its own kinds, those of HTTP libraries and plain ones
        raise UserError(
            f"the workspace was not saved to {workspace.entity}/{workspace.project}: {str(error).rstrip('.')}. "
            "Log in with `wandb login`, and name a project that exists; --dry-run shows it without an account"
        ) from error


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entity", required=True, help="the W&B user or team that owns the project")
    parser.add_argument("--project", default="gradstats", help="tracker.project of the runs (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="print the workspace as JSON; needs no account")
    options = parser.parse_args(arguments)
    with command_line():
        workspace = build(options.entity, options.project)
        if options.dry_run:
            print(as_json(workspace))
        else:
            save(workspace)


if __name__ == "__main__":
    main()
