"""Whether Python keeps what it compiles of a module, looked at without importing the module."""

import os
import py_compile
import subprocess
import sys
from pathlib import Path

import pytest

from engine_loader.start.bytecode import why_not_kept
from tests.support.children import in_child
from tests.support.mounts import make_read_only, mounts_work, own_mounts


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that was never imported."""
    (tmp_path / "some_engine").mkdir()
    source = tmp_path / "some_engine" / "__init__.py"
    source.write_text("raise AssertionError('nobody may import this')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    return source


def test_where_it_can_be_written_it_will_be_kept(package: Path) -> None:
    assert why_not_kept("some_engine") is None


def test_where_it_is_there_nothing_need_be_written(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    py_compile.compile(str(package))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    assert why_not_kept("some_engine") is None


@pytest.mark.parametrize("change", ["another time", "another size", "another Python", "cut short"])
def test_compiled_code_that_python_would_not_take_does_not_count(
    package: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    compiled = Path(py_compile.compile(str(package)) or "")
    match change:
        case "another time":
            os.utime(package, (1, 1))
        case "another size":
            status = package.stat()
            package.write_text("")
            os.utime(package, ns=(status.st_atime_ns, status.st_mtime_ns))
        case "another Python":
            compiled.write_bytes(b"abcd" + compiled.read_bytes()[4:])
        case "cut short":
            compiled.write_bytes(b"abcd")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    assert why_not_kept("some_engine") == "PYTHONDONTWRITEBYTECODE is set"


def test_compiled_code_that_is_not_checked_against_its_source_counts(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    py_compile.compile(str(package), invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
    os.utime(package, (1, 1))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    assert why_not_kept("some_engine") is None


def test_a_read_only_image_is_the_reason(package: Path, tmp_path: Path) -> None:
    if not mounts_work():
        pytest.skip("this machine lets nobody have mounts of his own")

    def look() -> str | None:
        own_mounts()
        make_read_only(tmp_path)
        return why_not_kept("some_engine")

    assert in_child(look) == f"{package.parent} cannot be written"


def test_the_variable_that_is_offered_helps(package: Path, tmp_path: Path) -> None:
    program = "import sys; sys.path.insert(0, sys.argv[1]); from engine_loader.start.bytecode import why_not_kept"
    program += "; print(sys.pycache_prefix, why_not_kept('some_engine'))"
    (package.parent / "__pycache__").write_text("in the way: nothing can be written here")
    for prefix, said in (("", False), (str(tmp_path / "kept"), True)):
        env = {**os.environ, "PYTHONPYCACHEPREFIX": prefix}
        env.pop("PYTHONDONTWRITEBYTECODE", None)
        done = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path)], env=env, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip().endswith("None") is said


@pytest.mark.parametrize("name", ["no_such_module", "sys", "__main__"])
def test_what_has_no_source_is_passed_over(name: str) -> None:
    assert why_not_kept(name) is None
