"""Colours and dashes of groups: a scale of colours for a number, and else colours that differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.colors import to_hex

from experiments.pages.groups import Group, is_numeric
from experiments.themes import DARK, LIGHT, Theme

DASHES = ("none", "6 3", "2 2", "8 2 2 2")
MOST = 24  # three rounds through eight colours: of more curves a legend does not help to tell one from another


@dataclass(frozen=True)
class Appearance:
    """One colour on a light page, one on a dark one; dash as in SVG."""

    light: str
    dark: str
    dash: str

    def style(self) -> str:
        return f"--light:{self.light};--dark:{self.dark};--dash:{self.dash}"


def appearances(groups: Sequence[Group], telling: Sequence[str]) -> list[Appearance]:
    """Of groups that differ in a number, and in few things more, the number is the colour and the rest the dash."""
    numbers = [key for key in telling if is_numeric(groups, key)]
    if numbers:
        number = "train.batch_size" if "train.batch_size" in numbers else numbers[0]
        rest = [str([group.settings.get(key) for key in telling if key != number]) for group in groups]
        values = sorted({group.settings[number] for group in groups})
        others = list(dict.fromkeys(rest))
        if len(values) > 2 and len(others) <= len(DASHES):
            places = np.linspace(0, 1, len(values))[[values.index(group.settings[number]) for group in groups]]
            dashes = [DASHES[others.index(other)] for other in rest]
            return [
                Appearance(to_hex(LIGHT.batch_sizes(place)), to_hex(DARK.batch_sizes(place)), dash)
                for place, dash in zip(places, dashes, strict=True)
            ]
    return distinct(len(groups))


def distinct(count: int) -> list[Appearance]:
    """All colours, then all of them dashed, and so on."""
    light, dark = _palette(LIGHT), _palette(DARK)
    return [
        Appearance(light[i % len(light)], dark[i % len(dark)], DASHES[i // len(light) % len(DASHES)])
        for i in range(count)
    ]


def _palette(theme: Theme) -> tuple[str, ...]:
    return (theme.ours[0], *theme.baselines, theme.reference, theme.ours[1])
