from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest
import torch

from experiments import checkpoint
from experiments.errors import UserError, as_user_errors

CPU = torch.device("cpu")


def state(number: int) -> dict[str, object]:
    return {"number": number, "weights": torch.arange(1000.0) * number, "nested": {"loss": [0.5, 0.25], "id": None}}


def test_round_trip(tmp_path: Path) -> None:
    loaded = checkpoint.load(checkpoint.save(tmp_path, state(1)), CPU)
    assert torch.equal(loaded.pop("weights"), torch.arange(1000.0))
    assert loaded == {"number": 1, "nested": {"loss": [0.5, 0.25], "id": None}}


def test_the_one_before_is_kept_and_nothing_else(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        checkpoint.save(tmp_path, state(number))
    assert checkpoint.load(tmp_path / checkpoint.FILE, CPU)["number"] == 3
    assert checkpoint.load(tmp_path / checkpoint.PREVIOUS, CPU)["number"] == 2
    assert len(list(tmp_path.iterdir())) == 2


def test_a_failed_write_leaves_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, state(1))

    def full(descriptor: int) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="no space"):
            checkpoint.save(tmp_path, state(2))
    assert checkpoint.load(tmp_path / checkpoint.FILE, CPU)["number"] == 1
    assert len(list(tmp_path.iterdir())) == 1


def test_a_file_that_cannot_grow_leaves_the_last_one(tmp_path: Path) -> None:
    """As on a full disk, torch's own writer meets the error, and fails over it with another one."""
    checkpoint.save(tmp_path, state(1))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with (
            pytest.raises(UserError, match=f"File too large: '{tmp_path / checkpoint.FILE}': make room"),
            as_user_errors(),
        ):
            checkpoint.save(tmp_path, state(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoint.load(tmp_path / checkpoint.FILE, CPU)["number"] == 1
    assert len(list(tmp_path.iterdir())) == 1


def test_what_a_killed_process_left_of_a_checkpoint_goes(tmp_path: Path) -> None:
    (tmp_path / f".{checkpoint.FILE}.123").write_bytes(b"half")
    (tmp_path / ".mine").write_bytes(b"whole")
    checkpoint.save(tmp_path, state(1))
    assert {path.name for path in tmp_path.iterdir()} == {checkpoint.FILE, ".mine"}


def test_a_kill_between_the_two_renames_leaves_the_previous_one(tmp_path: Path) -> None:
    assert checkpoint.find(tmp_path) is None
    path = checkpoint.save(tmp_path, state(1))
    path.rename(tmp_path / checkpoint.PREVIOUS)
    found = checkpoint.find(tmp_path)
    assert found is not None and checkpoint.load(found, CPU)["number"] == 1


DAMAGES = {
    "truncated": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "one bit": lambda data: data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :],
    "another file": lambda data: b"not a checkpoint",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_reported_with_the_way_out(tmp_path: Path, damage: str) -> None:
    path = checkpoint.save(tmp_path, state(1))
    whole = path.read_bytes()
    path.write_bytes(DAMAGES[damage](whole))
    with pytest.raises(UserError, match=f"{path} is damaged .* delete {path} to start from the beginning"):
        checkpoint.load(path, CPU)

    path.write_bytes(whole)
    checkpoint.save(tmp_path, state(2))
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    previous = tmp_path / checkpoint.PREVIOUS
    with pytest.raises(UserError, match=f"move {previous} to {path}"):
        checkpoint.load(path, CPU)
    assert checkpoint.load(previous, CPU)["number"] == 1


def test_random_state_round_trip() -> None:
    before = checkpoint.random_state(CPU)
    drawn = torch.rand(4)
    checkpoint.restore_random_state(before, CPU)
    assert torch.equal(torch.rand(4), drawn)
