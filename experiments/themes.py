"""How figures look, on a light and on a dark page."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator


@dataclass(frozen=True)
class Theme:
    """Colours of one colour scheme; methods are Okabe and Ito's palette, told apart by colour-blind readers too."""

    background: str
    ink: str
    faint: str
    batch_sizes: Colormap
    reference: str
    ours: tuple[str, ...]
    baselines: tuple[str, ...]


def _part_of_viridis(start: float, stop: float) -> Colormap:
    # The ends of viridis disappear in a dark and in a white background.
    return LinearSegmentedColormap.from_list("viridis", matplotlib.colormaps["viridis"](np.linspace(start, stop, 64)))


LIGHT = Theme(
    background="#ffffff",
    ink="#1f2328",
    faint="#8b939c",
    batch_sizes=_part_of_viridis(0.0, 0.88),
    reference="#1f2328",
    ours=("#0072b2", "#56b4e9"),
    baselines=("#e69f00", "#d55e00", "#cc79a7", "#009e73", "#8c6d31"),
)
DARK = Theme(
    background="#15191e",
    ink="#e6e9ed",
    faint="#7d8590",
    batch_sizes=_part_of_viridis(0.25, 1.0),
    reference="#e6e9ed",
    ours=("#4aa8ff", "#a5d8ff"),
    baselines=("#f0b429", "#ff7b54", "#e59bc4", "#3ecf9b", "#c9a66b"),
)


@contextmanager
def canvas(theme: Theme, width: float, height: float, seeds: int | None = None) -> Iterator[Figure]:
    """An empty figure of so many inches, to be drawn on within the `with`: there its colours and sizes hold.

    seeds: noted below the figure, where its bars and bands are 95% intervals over so many.
    """
    style: Any = {
        "figure.facecolor": theme.background,
        "axes.facecolor": theme.background,
        "axes.edgecolor": theme.faint,
        "axes.labelcolor": theme.ink,
        "axes.linewidth": 0.7,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 9,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlepad": 8,
        "axes.labelsize": 8.5,
        "font.size": 8.5,
        "text.color": theme.ink,
        "xtick.color": theme.ink,
        "ytick.color": theme.ink,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
        "xtick.major.width": 0.7,
        "ytick.major.width": 0.7,
        "legend.frameon": False,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.09))
        if seeds is not None:
            told = f"{seeds} seeds; bars and bands: 95% intervals"
            figure.supxlabel(told, x=0.99, ha="right", fontsize=7.5, color=theme.faint)
        yield figure


def image(figure: Figure, kind: str) -> bytes:
    """The file contents of a figure as "png" (at 200 dots per inch) or "svg"."""
    buffer = io.BytesIO()
    # With a fixed salt and no date the same records give the same file, byte for byte.
    with matplotlib.rc_context({"svg.hashsalt": "gradstats"}):
        figure.savefig(buffer, format=kind, dpi=200, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()


def plain_log_ticks(axes: Axes) -> None:
    """Label 1, 2 and 5 of each decade where a logarithmic axis spans less than two decades, else the decades."""
    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_scale() != "log":
            continue
        low, high = axis.get_view_interval()
        few = MaxNLocator(5) if high / low < 3 else None  # of a decade's 1, 2 and 5 one at most
        axis.set_major_locator(few or LogLocator(subs=(1, 2, 5) if high / low < 100 else (1,)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))


def _short(value: float) -> str:
    return f"{value / 1000:g}k" if value >= 1000 else f"{value:g}"
