"""Against a server of this process: nothing leaves the machine."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from experiments.data.download import check, download
from experiments.errors import UserError

CONTENT = b"a text"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    served = tmp_path / "served"
    served.mkdir()
    (served / "text").write_bytes(CONTENT)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(served))) as server:
        thread = Thread(target=server.serve_forever, args=(0.01,))  # seconds between looks for the end
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_file_is_fetched_once(tmp_path: Path, address: str) -> None:
    path = download(f"{address}/text", SHA256, tmp_path / "cache")
    assert path.read_bytes() == CONTENT
    (tmp_path / "served/text").unlink()
    assert download(f"{address}/text", SHA256, tmp_path / "cache") == path


def test_another_file_is_refused_and_not_kept(tmp_path: Path, address: str) -> None:
    with pytest.raises(UserError, match=f"data.url={address}/text delivers has sha256 {SHA256}, and data.sha256=0123"):
        download(f"{address}/text", "0123", tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("path", ["http://127.0.0.1:9/text", "{address}/other", "no address"])
def test_a_missing_network_names_the_way_out(tmp_path: Path, address: str, path: str) -> None:
    url = path.format(address=address)
    with pytest.raises(UserError, match=f"data.url={url} cannot be read .* give the file as data.path=FILE"):
        download(url, SHA256, tmp_path / "cache")


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, address: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"data.cache={tmp_path / 'file'} cannot be written"):
        download(f"{address}/text", SHA256, tmp_path / "file")


def test_checksums() -> None:
    assert check(CONTENT, None, "it") == check(CONTENT, SHA256, "it") == SHA256
