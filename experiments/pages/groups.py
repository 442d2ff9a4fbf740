"""Runs that differ only in their seed, and the configuration keys on which such groups differ."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.estimate import Estimate, over_seeds
from experiments.fingerprint import NOT_IN_FINGERPRINT
from experiments.pages.runs import Run

ABSENT = "–"
# The keys by which readers know runs, before any others.
FIRST = ("data.name", "model.name", "optimizer.label", "train.batch_size", "optimizer.lr")
# Their values speak for themselves in a label.
WITHOUT_KEY = frozenset({"data.name", "model.name", "optimizer.label", "optimizer.name", "engine.name"})
RANK = {"finished": 2, "diverged": 1, "unfinished": 0}


@dataclass(frozen=True)
class Group:
    """key: its name in a page; label: the fewest values that tell it apart, empty of a group that is alone.

    settings: the configuration without the seed, by dotted keys.
    """

    key: str
    label: str
    settings: dict[str, Any]
    runs: tuple[Run, ...]

    def mean(self, metric: str) -> float:
        """Of the final values of the seeds that have ended; nan if none has."""
        values = self._final(metric)
        return float(values.mean()) if len(values) else float("nan")

    def final(self, metric: str) -> Estimate:
        """The mean with a 95% bootstrap interval over the seeds; accuracies are shown in per cent."""
        percent = metric.startswith("accuracy/")
        values = self._final(metric)
        if not len(values):
            return Estimate(np.nan, np.nan, np.nan, percent)
        return dataclasses.replace(over_seeds(values), percent=percent)

    def _final(self, metric: str) -> NDArray[np.float64]:
        values = np.array([run.final(metric) for run in self.runs])
        return values[np.isfinite(values)]


@dataclass(frozen=True)
class Collection:
    """differing: all keys on which the groups differ; telling: as few of them as tell every group apart."""

    groups: tuple[Group, ...]
    differing: tuple[str, ...]
    telling: tuple[str, ...]
    repeated: int  # runs left out, since another has the same configuration and seed

    @property
    def runs(self) -> list[Run]:
        return [run for group in self.groups for run in group.runs]

    def common(self) -> dict[str, Any]:
        """What all groups have, by dotted keys."""
        return {key: value for key, value in self.groups[0].settings.items() if key not in self.differing}


def group(runs: Sequence[Run]) -> Collection:
    """Of runs with the same configuration and seed only one counts: the one that got furthest."""
    settings: dict[str, dict[str, Any]] = {}
    members: dict[str, dict[int, Run]] = {}
    for run in sorted(runs, key=lambda run: (RANK[run.status], run.reach)):
        own = {key: value for key, value in run.config.items() if _decides(key)}
        identity = json.dumps(own, sort_keys=True)
        settings[identity] = own
        members.setdefault(identity, {})[run.seed] = run
    differing = _differing(list(settings.values()))
    telling = _telling(differing, list(settings.values()))
    order = sorted(settings, key=lambda identity: [_rank(settings[identity].get(key)) for key in telling])
    groups = tuple(
        Group(
            f"g{i}",
            label(settings[identity], telling),
            settings[identity],
            tuple(sorted(members[identity].values(), key=lambda run: run.seed)),
        )
        for i, identity in enumerate(order)
    )
    return Collection(groups, differing, telling, len(runs) - sum(len(group.runs) for group in groups))


def states(runs: Iterable[Run]) -> str:
    """As in "3 finished, 1 diverged"."""
    counts: Counter[str] = Counter(run.status for run in runs)
    return ", ".join(f"{counts[state]} {state}" for state in RANK if counts[state])


def label(settings: dict[str, Any], keys: Sequence[str]) -> str:
    """As in "Adam · B = 16 · lr = 0.004"."""
    short = Counter(map(named, keys))
    parts = []
    for key in keys:
        value = shown(settings.get(key, ABSENT))
        if value != ABSENT:
            parts.append(value if key in WITHOUT_KEY else f"{named(key) if short[named(key)] == 1 else key} = {value}")
    return " · ".join(parts)


def named(key: str) -> str:
    """A key without its group."""
    return "B" if key == "train.batch_size" else key.rpartition(".")[2]


def shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else "none" if value is None else json.dumps(value)


def is_numeric(groups: Iterable[Group], key: str) -> bool:
    return all(_is_number(group.settings.get(key)) for group in groups)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _decides(key: str) -> bool:
    return key != "seed" and key.partition(".")[0] not in NOT_IN_FINGERPRINT


def _differing(settings: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    keys = dict.fromkeys([*FIRST, *(key for own in settings for key in own)])
    return tuple(key for key in keys if len({json.dumps(own.get(key, ABSENT)) for own in settings}) > 1)


def _telling(keys: Sequence[str], settings: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """Greedily: a key is taken if it tells groups apart that those before it do not."""
    taken: list[str] = []
    parts = 1
    for key in keys:
        count = len({json.dumps([own.get(k, ABSENT) for k in (*taken, key)]) for own in settings})
        if count > parts:
            taken, parts = [*taken, key], count
    return tuple(taken)


def _rank(value: Any) -> tuple[bool, float, str]:
    return (False, float(value), "") if _is_number(value) else (True, 0.0, shown(value))
