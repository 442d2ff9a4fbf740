"""Compiled once, used where it can be, and done without where it cannot."""

from pathlib import Path

import pytest
import torch

from gradstats import native
from gradstats.forms.outer import OuterSum
from gradstats.native import build, outer_sum

KERNELS = "outer_sum", "adam"
needs_compiler = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A user who has compiled nothing yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return build.library.__wrapped__


@needs_compiler
@pytest.mark.parametrize("name", KERNELS)
def test_compiled_once_for_all_processes(fresh, monkeypatch, tmp_path, name):
    assert fresh(name) is not None
    (path,) = (tmp_path / "gradstats").iterdir()
    assert path.suffix == ".so"
    monkeypatch.setattr(build, "run", lambda *command: pytest.fail("compiled again"))
    assert fresh(name) is not None


@needs_compiler
def test_other_instructions_are_another_library(fresh, monkeypatch, tmp_path):
    monkeypatch.setattr(build, "build", lambda *_: _[-1].touch())
    for capability in ("AVX512", "AVX2", "DEFAULT"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        with pytest.warns(UserWarning, match="could not be had"):  # an empty file is no library
            fresh("outer_sum")
    assert len(list((tmp_path / "gradstats").iterdir())) == 3


@needs_compiler
@pytest.mark.parametrize("name", KERNELS)
def test_threads_are_those_of_torch(name):
    """Of two OpenMP libraries in a process, each would have threads of its own."""
    compiled = Path(build.library(name)._name).read_bytes()
    assert b"GOMP_parallel" in compiled or b"__kmpc_fork_call" in compiled
    assert b"libgomp" not in compiled and b"libomp" not in compiled


def test_without_a_compiler_torch_does_it(fresh, monkeypatch):
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    assert build.compiler() is None and fresh("outer_sum") is None
    monkeypatch.setattr(native, "library", fresh)
    d, a = torch.randn(3, 4, 5, dtype=torch.float64), torch.randn(3, 4, 6, dtype=torch.float64)
    form, c = OuterSum(d, a), torch.einsum("nto,nti->noi", d, a)
    assert "native" not in form.ways(["sum_of_squares"])
    gradient, found = form.sums(["sum_of_squares"])
    torch.testing.assert_close(gradient, c.sum(0))
    torch.testing.assert_close(found["sum_of_squares"], c.square().sum(0))


@needs_compiler
@pytest.mark.parametrize("others", ["write", "own"])
def test_nothing_is_run_from_where_others_may_write(fresh, monkeypatch, tmp_path, others):
    kept = tmp_path / "gradstats"
    assert fresh("outer_sum") is not None and kept.stat().st_mode & 0o777 == 0o700
    (path,) = kept.iterdir()
    path.unlink()  # what was loaded stays in memory: written over, it would end this process when it is left
    path.write_bytes(b"planted")
    if others == "write":
        kept.chmod(0o770)
    else:
        monkeypatch.setattr(build.os, "getuid", lambda: kept.stat().st_uid + 1)
    kernels = fresh("outer_sum")
    assert kernels is not None and not Path(kernels._name).is_relative_to(kept)
    assert not Path(kernels._name).parent.exists() and path.read_bytes() == b"planted"
    with monkeypatch.context() as patch:
        patch.setattr(native, "library", lambda name: kernels)
        d, a = torch.randn(3, 4, 5), torch.randn(3, 4, 6)
        torch.testing.assert_close(outer_sum.sums(d, a, ["squared_norms"])[0], torch.einsum("nto,nti->oi", d, a))


def test_the_compiler_is_what_the_user_says(monkeypatch):
    monkeypatch.setattr(build.shutil, "which", lambda name: name in ("g++", "clang++", "mine"))
    for named, expected in ((None, "g++"), ("mine", "mine"), ("missing", "g++")):
        monkeypatch.delenv("CXX", raising=False)
        if named:
            monkeypatch.setenv("CXX", named)
        assert build.compiler_of_cpu() == expected


@needs_compiler
@pytest.mark.parametrize(
    ("fails", "said"),
    [("compiler", "nonsense"), ("directory", "FileExistsError"), ("symbols", "outer_sum"), ("home", "home directory")],
)
def test_what_goes_wrong_is_said(fresh, monkeypatch, tmp_path, fails, said):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    if fails == "home":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(build.Path, "home", no_home)
    elif fails == "symbols":
        monkeypatch.setattr(build, "SOURCES", tmp_path)
        (tmp_path / "outer_sum.cpp").write_text("int x = 0;")
    elif fails == "compiler":
        monkeypatch.setattr(build, "SOURCES", tmp_path)
        (tmp_path / "outer_sum.cpp").write_text("int x = nonsense;")
    else:
        (tmp_path / "gradstats").touch()
    with pytest.warns(UserWarning, match=said):
        assert fresh("outer_sum") is None
    assert fails == "symbols" or not list(tmp_path.glob("gradstats/*"))


@needs_compiler
def test_without_torchs_headers_one_kernel_is_done_without(fresh, monkeypatch, tmp_path):
    """Which Adam's includes, and the other does not."""
    source = build.KERNELS["adam"]
    flags = tuple(str(tmp_path) if flag.endswith("include") else flag for flag in source.flags)
    monkeypatch.setitem(build.KERNELS, "adam", source._replace(flags=flags))
    with pytest.warns(UserWarning, match="Adam's step could not be had.*TensorImpl"):
        assert fresh("adam") is None
    assert fresh("outer_sum") is not None
