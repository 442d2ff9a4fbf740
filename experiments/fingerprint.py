"""What decides the numbers of a run, as sixteen digits, and what two configurations differ in."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from experiments.data.help_texts import help_texts
from experiments.schemas.data import FileTextConfig, TextConfig
from experiments.schemas.run import Config

# None of these decides a number: two runs that differ only here are the same run.
NOT_IN_FINGERPRINT = frozenset({"name", "directory", "resume", "tracker", "search", "tune"})


def as_dict(config: Config) -> dict[str, Any]:
    """Plain numbers, strings, lists and dictionaries."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return plain


def identity(config: Config) -> dict[str, Any]:
    """The part of the configuration that decides the numbers of a run.

    Without options of a group's member that have the default of its schema: only options that came later have one, and
    runs that were made before stay what they are. With a checksum of what is in data.path, and of this Python's help
    texts where they are the data: both may become others.
    """
    deciding = {key: value for key, value in as_dict(config).items() if key not in NOT_IN_FINGERPRINT}
    kept = without_defaults(deciding, config)
    path = getattr(config.data, "path", None)
    if path is not None and (found := content(Path(path))) is not None:
        kept["data"]["content"] = found
    if isinstance(config.data, TextConfig) and not isinstance(config.data, FileTextConfig):
        kept["data"]["content"] = hashlib.sha256(help_texts()).hexdigest()
    return kept


def without_defaults(values: dict[str, Any], like: Config) -> dict[str, Any]:
    """Groups without the options that have the default of their schema, which is that of the configuration `like`."""
    kept = dict(values)
    for key in kept:
        if dataclasses.is_dataclass(member := getattr(like, key)) and isinstance(kept[key], dict):
            defaults = {f.name: f.default for f in dataclasses.fields(member)}
            kept[key] = {
                name: value for name, value in kept[key].items() if value != defaults.get(name, dataclasses.MISSING)
            }
    return kept


def content(path: Path) -> str | None:
    """A checksum of a file, or of the files in a folder with their names; None where there is neither."""
    if path.is_file():
        state = path.stat()
        return _checksum(path, state.st_size, state.st_mtime_ns)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file())
        return hashlib.sha256(json.dumps([[file.name, content(file)] for file in files]).encode()).hexdigest()
    return None


# Asked for at every checkpoint: a file is read again only where its size or its time is another.
@cache
def _checksum(path: Path, size: int, modified: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(config: Config) -> str:
    """Sixteen hexadecimal digits that identify `identity(config)`."""
    return hashlib.sha256(json.dumps(identity(config), sort_keys=True).encode()).hexdigest()[:16]


def first_difference(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """The first key, in dotted form, at which two identities differ, with both values; None if they are equal."""
    old_values, new_values = dict(flatten(old)), dict(flatten(new))
    for key in [*new_values, *old_values]:
        before, after = (values.get(key, "absent") for values in (old_values, new_values))
        if before != after:
            return f"{key} was {before} and is now {after}"
    return None


def flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
