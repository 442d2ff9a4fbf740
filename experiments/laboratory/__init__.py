"""The experiments: a module or a package each, by the name of its `study` in conf/experiment/.

A package has its settings' jobs in study.py and what these measure in modules of its own; analysis.py makes numbers of
their results, which findings.py judges, tables.py lists and figure.py draws.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from experiments.errors import choose
from experiments.laboratory.schemas import STUDIES, StudyConfig

if TYPE_CHECKING:
    from experiments.study import Study


def load(settings: StudyConfig) -> Study[Any]:
    """The study with these settings. Its module is experiments.laboratory.<name>, and exports it as STUDY."""
    choose(STUDIES, settings.name, "study.name")
    # Only the one that is asked for: they draw, and what draws is slow to import.
    study: Study[Any] = import_module(f"experiments.laboratory.{settings.name}").STUDY(settings)
    study.check()
    return study
