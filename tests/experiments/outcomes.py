"""Studies that have come to their end, without a run: what their directories say of them."""

from __future__ import annotations

from pathlib import Path

from experiments.catalogue import Experiment
from experiments.description import Description, Place, Summary
from experiments.estimate import Finding
from experiments.fingerprint import as_dict

FINDINGS = [
    Finding("lr0 drifts by half an octave at most", "holds", "It drifts by 0.2 [0.1, 0.3] octaves over B < 256."),
    Finding("a bar", "does not hold", "It is 2 [1, 3]."),
    Finding("another bar", "holds", "It is 3 [2, 4]."),
    Finding("", None, "A note with a_name and *stars*."),
]


def write(experiment: Experiment, *, seconds: float = 600.0, findings: list[Finding] = FINDINGS) -> Path:
    """As launch.run_study leaves the directory."""
    directory = experiment.directory
    assert experiment.config.study is not None
    command = (
        f"python -m experiments.train experiment={experiment.name} tracker=none directory=/elsewhere study.workers=1"
    )
    described = Description(
        config=as_dict(experiment.config) | {"directory": "/elsewhere"},
        jobs=[Place("runs/0", {"seed": 0}), Place("runs/1", {"seed": 1})],
        command=command,
        environment={"python": "3.11", "machine": "imaginary, 2 cores"},
    )
    described.save(directory)
    Summary(
        title="A title",
        question="Is it so?",
        source="A paper, section 2",
        command=command,
        note=experiment.config.study.note,
        jobs=2,
        seconds=seconds,
        environment=described.environment,
        caption="What is\nseen.",
        alternative="A curve [in words].",
        findings=findings,
    ).save(directory)
    (directory / "figure.png").write_bytes(f"picture of {experiment.name}".encode())
    return directory
