"""What a page of runs is called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.errors import HydraException

from experiments.config import compose_config
from experiments.fingerprint import NOT_IN_FINGERPRINT, as_dict, flatten
from experiments.pages.groups import FIRST, Collection, label
from experiments.pages.runs import Run

NAMED = 3  # paths
TOLD = 6  # values
GROUPS = ("data", "model", "optimizer", "engine")
NAMES = ("data.name", "model.name", "optimizer.label", "engine.name")  # of their members


def title(collection: Collection, paths: Sequence[Path]) -> str:
    """Of a single run its name, and what it differs in from the defaults: its directory may be a time."""
    if len(collection.runs) == 1 and (name := named(collection.runs[0])):
        return name
    names = list(dict.fromkeys(path.resolve().name for path in paths))
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def named(run: Run) -> str:
    """Empty if it has none, as a run from before there was a history."""
    name, keys = run.config.get("name", ""), changed(run.config)
    told = label(run.config, keys[:TOLD]) + (f" and {len(keys) - TOLD} more" if len(keys) > TOLD else "")
    return f"{name}: {told}" if name and told else name


def changed(config: Mapping[str, Any]) -> list[str]:
    """The groups of which it has another member than the default run, and the keys in which it differs from the members
    that it has. Nothing is known of members that conf/ has no longer."""
    members = [f"{group}={config[f'{group}.name']}" for group in GROUPS if f"{group}.name" in config]
    try:
        default, own = (dict(flatten(as_dict(compose_config(chosen)))) for chosen in ([], members))
    except HydraException:
        return []
    decide = {
        key: value for key, value in config.items() if key in own and key.partition(".")[0] not in NOT_IN_FINGERPRINT
    }
    others = [key for key in NAMES if key in decide and own[key] != default[key]]
    return sorted({*others, *(key for key, value in decide.items() if value != own[key])}, key=_place)


def _place(key: str) -> tuple[int, str]:
    return (FIRST.index(key) if key in FIRST else len(FIRST), key)
