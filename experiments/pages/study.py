"""The page of a study: its figure, what its results say, and how to have them again."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path

from omegaconf import OmegaConf

from experiments.description import Description, Summary
from experiments.pages import html
from experiments.study import Outcome


def page(
    summary: Summary, outcome: Outcome, description: Description, directory: Path, light: bytes, dark: bytes
) -> str:
    """light and dark: the figure as SVG, on either page."""
    again = [description.command, f"python -m experiments.report {directory}    # this page again, from the results"]
    configuration = OmegaConf.to_yaml(OmegaConf.create(description.config)).splitlines()
    setting = html.properties("Versions", description.environment) + html.details(
        "Configuration", html.commands("Configuration", configuration)
    )
    sections = [
        ("Figure", _figure(outcome, light, dark)),
        ("Findings", html.findings(outcome.findings)),
        ("Tables", "\n".join(map(html.table, outcome.tables))),
        ("How to read it", html.definitions(outcome.terms)),
        ("Run it again", html.commands("Commands", again)),
        ("Configuration and versions", setting),
    ]
    introduction = [
        html.paragraph(summary.question),
        html.paragraph(f"Tested: {summary.source}", "muted"),
        html.paragraph(summary.note, "note"),
    ]
    return html.page(
        title=summary.title,
        introduction="\n".join(introduction),
        body="\n".join(html.section(heading, content) for heading, content in sections if content),
        footer=f"Made by gradstats from {summary.jobs} jobs, {_told(summary.seconds)} of computing in all.",
    )


def _figure(outcome: Outcome, light: bytes, dark: bytes) -> str:
    source, image = (f"data:image/svg+xml;base64,{base64.b64encode(figure).decode()}" for figure in (dark, light))
    picture = (
        f'<picture>\n<source media="(prefers-color-scheme: dark)" srcset="{source}">\n'
        f'<img src="{image}" alt="{escape(outcome.alternative)}">\n</picture>'
    )
    caption = f"<figcaption>{escape(outcome.caption)}</figcaption>"
    return f"<figure>\n{html.scrolling('Figure', picture, 'wide')}\n{caption}\n</figure>"


def _told(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{seconds:.0f} seconds"
