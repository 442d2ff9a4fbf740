"""Runs that are kept, and the pages that follow from them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.benchmarks import record
from experiments.errors import UserError
from tests.experiments.benchmarks.synthetic import run

PAGE = "# Benchmark\n<!-- runs: how -->\nold\n<!-- /runs -->\nend\n"
README = "# Title\n<!-- price: how -->\nold\n<!-- /price -->\nend\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    record.PAGE.parent.mkdir()
    record.PAGE.write_text(PAGE)
    record.README.write_text(README)
    return tmp_path


def test_pages_are_of_the_newest_run_of_each_device(folder: Path) -> None:
    for about in (
        {"processor": "older"},
        {"processor": "newer"},
        {"device": "cuda:0", "processor": "graphics", "dtype": "bfloat16"},
    ):
        record.append(run(**about))
    record.write_pages()
    page, readme = record.PAGE.read_text(), record.README.read_text()
    assert "## newer, float32" in page and "## graphics, bfloat16" in page and "older" not in page + readme
    assert "![Time against memory](benchmark_cuda.png)" in page
    assert "| MLP 784-1024-1024-10 | 1.50 |" in readme and "graphics" not in readme
    for text in (page, readme):
        assert text.startswith("# ") and "old\n" not in text and text.endswith("-->\nend\n")
    for device in ("cpu", "cuda"):
        assert record.RECORD.with_name(f"benchmark_{device}.png").stat().st_size > 1000
    assert [found["about"]["processor"] for found in json.loads(record.RECORD.read_text())] == [
        "older",
        "newer",
        "graphics",
    ]


def test_processors_of_other_instructions_are_other_devices(folder: Path) -> None:
    for about in ({}, {"instructions": "AVX2"}, {"instructions": "AVX512", "processor": "wide"}):
        record.append(run(**about))
    record.write_pages()
    page = record.PAGE.read_text()
    assert "## abacus, float32" in page and "## abacus, AVX2, float32" in page and "## wide, AVX512, float32" in page
    for figure in ("benchmark_cpu.png", "benchmark_cpu_avx2.png", "benchmark_cpu_avx512.png"):
        assert f"({figure})" in page and record.RECORD.with_name(figure).exists()


def test_a_run_with_another_compiler_takes_the_place_of_an_older_one(folder: Path) -> None:
    """Which may not have told of any."""
    for about in ({"processor": "older"}, {"compiler": "g++ 12", "triton": "3.7"}, {"compiler": "g++ 13"}):
        record.append(run(**about))
    record.write_pages()
    page = record.PAGE.read_text()
    assert [line for line in page.splitlines() if line.startswith("## ")] == ["## abacus, float32"]
    assert "compiler g++ 13" in page and "g++ 12" not in page and "triton" not in page
    assert [found.about.get("triton") for found in record.records()] == [None, "3.7", None]


def test_without_matplotlib_there_is_no_figure(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record.importlib.util, "find_spec", lambda name: None)
    record.append(run())
    record.write_pages()
    assert "![" not in record.PAGE.read_text() and "**gradstats**" in record.PAGE.read_text()
    assert not list(Path("docs").glob("*.png"))


def test_quick_runs_are_not_kept(folder: Path) -> None:
    with pytest.raises(UserError, match="a quick run says nothing"):
        record.append(run(quick=True))
    assert not record.RECORD.exists()


def test_what_is_missing_is_named(folder: Path) -> None:
    with pytest.raises(UserError, match="nothing is recorded in docs/benchmark.json"):
        record.write_pages()
    record.append(run())
    record.README.write_text("# Title\n")
    with pytest.raises(UserError, match="README.md has no lines '<!-- price: "):
        record.write_pages()
    Path("other.json").write_text('{"date": "2026-01-01"}')
    for path in (Path("other.json"), Path("none.json")):
        with pytest.raises(UserError, match=f"{path} is no benchmark.json of a run"):
            record.load_run(path)
