from pathlib import Path

import pytest

from experiments.atomic import atomic_write


def test_the_file_appears_only_when_it_is_whole(tmp_path: Path):
    path = tmp_path / "file"
    with atomic_write(path) as file:
        file.write(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


def test_a_failure_leaves_what_was_there_and_nothing_else(tmp_path: Path):
    path, previous = tmp_path / "file", tmp_path / "previous"
    path.write_bytes(b"old")
    with pytest.raises(TypeError), atomic_write(path, previous) as file:
        file.writelines([b"half", None])  # type: ignore[list-item]
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_what_was_there_is_kept_if_asked(tmp_path: Path):
    path, previous = tmp_path / "file", tmp_path / "previous"
    for content in (b"1", b"2", b"3"):
        with atomic_write(path, previous) as file:
            file.write(content)
    assert (path.read_bytes(), previous.read_bytes()) == (b"3", b"2")
