"""Fix-ups are guarded by the lines that they replace, not by versions."""

import importlib
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine_loader.engines.common.fixups import Fixup, apply_needed

Install = Callable[[str, str], None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Installs a package ``faulty_engine`` of a version, whose ``part.py`` has these lines."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def install(version: str, lines: str) -> None:
        package, metadata = tmp_path / "faulty_engine", tmp_path / f"faulty_engine-{version}.dist-info"
        for directory in (package, metadata):
            directory.mkdir()
        (package / "__init__.py").touch()
        (package / "part.py").write_text(lines)
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: faulty_engine\nVersion: {version}\n")
        importlib.invalidate_caches()

    return install


def fixup(apply: Callable[[Any], None] = lambda module: None) -> Fixup:
    return Fixup(
        name="an-example",
        distribution="faulty_engine",
        module="faulty_engine.part",
        read_up_to=(1, 2),
        upstream="    wrong()\n",
        why="it is slow",
        patch="none.patch",
        apply=apply,
    )


def repair(module: Any) -> None:
    module.wrong = "right"


@pytest.mark.parametrize("version", ["0.9", "1.2.3", "1.3", "2.0.1+cpu"])
def test_it_is_applied_where_its_lines_are_whatever_the_version(version: str, install: Install) -> None:
    install(version, "def f():\n    wrong()\n")
    module = SimpleNamespace(wrong="wrong")
    apply_needed([fixup(repair)], module)
    assert module.wrong == "right"


def test_it_is_not_applied_where_its_lines_are_not(install: Install) -> None:
    install("1.2", "def f():\n    right()\n")
    module = SimpleNamespace(wrong="wrong")
    apply_needed([fixup(repair)], module)
    assert module.wrong == "wrong"
    assert fixup().state() == "these lines are not there (patched, or changed)"


def test_a_build_that_is_installed_under_another_name_is_mended_too(install: Install, tmp_path: Path) -> None:
    install("1.2", "    wrong()\n")
    (tmp_path / "faulty_engine-1.2.dist-info").rename(tmp_path / "faulty_engine_cpu-1.2.dist-info")
    metadata = tmp_path / "faulty_engine_cpu-1.2.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text().replace("faulty_engine", "faulty_engine_cpu"))
    (tmp_path / "faulty_engine" / "_version.py").write_text("__version__ = version = '1.3.0'\n")
    importlib.invalidate_caches()
    assert fixup().state() == "needed"
    assert fixup().unread() == "faulty_engine 1.3 is newer than 1.2, up to which its source was read"


def test_a_version_that_nobody_has_read_is_remarked_on(install: Install) -> None:
    assert (fixup().state(), fixup().unread()) == ("faulty_engine is not installed", None)
    install("1.3", "    wrong()\n")
    assert fixup().unread() == "faulty_engine 1.3 is newer than 1.2, up to which its source was read"


def test_a_version_that_was_read_is_not_remarked_on(install: Install) -> None:
    install("1.2.9", "    wrong()\n")
    assert fixup().unread() is None


def test_a_fix_up_that_does_not_fit_any_more_is_a_warning_and_the_next_one_is_applied(
    install: Install, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    install("1.3", "    wrong()\n")

    def misfit(module: Any) -> None:
        raise AttributeError("module has no attribute 'gone'")

    module = SimpleNamespace(wrong="wrong")
    with caplog.at_level(logging.WARNING):
        apply_needed([fixup(misfit), fixup(repair)], module)
    assert module.wrong == "right"
    assert "an-example was not applied: module has no attribute 'gone'; faulty_engine 1.3 is newer" in caplog.text
