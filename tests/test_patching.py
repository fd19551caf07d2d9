"""Patches of installed packages: applied where every line fits, taken back, refused where anything differs."""

import importlib
import json
import os
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from engine_loader import patching
from engine_loader.cli import app
from engine_loader.patching import BACKUP_SUFFIX, Patch, PatchError, all_patches, read_patch

ORIGINAL = "".join(f"line {number}\n" for number in range(1, 21))
PATCH = """Number the lines otherwise.

For: fake-engine >=1.2,<1.3

--- a/fake_engine/first.py
+++ b/fake_engine/first.py
@@ -3,3 +3,4 @@
 line 3
-line 4
+line four
+and a half
 line 5
@@ -12,2 +13,1 @@
 line 12
-line 13
--- a/fake_engine/below/second.py
+++ b/fake_engine/below/second.py
@@ -1,2 +1,3 @@
+line 0
 line 1
 line 2
"""


class Installation:
    """A package of two files that is installed, and the patch for it."""

    def __init__(self, site: Path, directory: Path) -> None:
        self.site = site
        self.first = site / "fake_engine" / "first.py"
        self.second = site / "fake_engine" / "below" / "second.py"
        self.second.parent.mkdir(parents=True)
        (site / "fake_engine" / "__init__.py").touch()
        self.first.write_text(ORIGINAL)
        self.second.write_text(ORIGINAL)
        self.version("1.2.7")
        self.file = directory / "fake-engine-1.2-numbers.patch"
        self.file.write_text(PATCH)

    def version(self, version: str) -> None:
        for old in self.site.glob("*.dist-info/METADATA"):
            old.unlink()
            old.parent.rmdir()
        metadata = self.site / f"fake_engine-{version}.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: fake-engine\nVersion: {version}\n")
        importlib.invalidate_caches()

    @property
    def patch(self) -> Patch:
        return read_patch(self.file)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Installation:
    site, patches = tmp_path / "site", tmp_path / "patches"
    site.mkdir()
    patches.mkdir()
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setattr(patching, "DIRECTORY", patches)
    monkeypatch.delitem(sys.modules, "fake_engine", raising=False)
    return Installation(site, patches)


def test_a_patch_is_applied_and_taken_back_byte_for_byte(installed: Installation) -> None:
    os.chmod(installed.first, 0o640)
    assert installed.patch.state() == "can be applied"
    assert installed.patch.apply() == [installed.first, installed.second]
    assert installed.patch.state() == "applied"
    lines = installed.first.read_text().splitlines()
    assert lines[2:6] == ["line 3", "line four", "and a half", "line 5"]
    assert "line 13" not in lines
    assert installed.second.read_text() == "line 0\n" + ORIGINAL
    assert installed.first.with_name(f"first.py{BACKUP_SUFFIX}").read_text() == ORIGINAL
    assert installed.first.stat().st_mode & 0o777 == 0o640
    assert installed.patch.apply() == []
    assert installed.patch.revert() == [installed.first, installed.second]
    assert (installed.first.read_text(), installed.second.read_text()) == (ORIGINAL, ORIGINAL)
    assert not list(installed.site.rglob(f"*{BACKUP_SUFFIX}"))
    assert installed.patch.revert() == []


def test_a_dry_run_writes_nothing(installed: Installation) -> None:
    assert installed.patch.apply(dry_run=True) == [installed.first, installed.second]
    assert installed.first.read_text() == ORIGINAL
    assert not list(installed.site.rglob(f"*{BACKUP_SUFFIX}"))


def test_lines_that_moved_are_found_and_those_that_stand_twice_are_not(installed: Installation) -> None:
    installed.first.write_text("# a comment that was added\n" * 7 + ORIGINAL)
    installed.patch.apply()
    assert "line four\n" in installed.first.read_text()
    installed.patch.revert()
    installed.first.write_text(ORIGINAL + ORIGINAL)
    assert installed.patch.state() == "differs"


def test_what_differs_is_refused_before_anything_is_written(installed: Installation) -> None:
    installed.second.write_text(ORIGINAL.replace("line 2\n", "line two\n"))
    assert installed.patch.state() == "differs"
    with pytest.raises(PatchError, match=r"second\.py is not the file of fake-engine 1\.2\.7"):
        installed.patch.apply()
    assert installed.first.read_text() == ORIGINAL
    installed.second.unlink()
    assert installed.patch.state() == "differs"


def test_a_file_that_was_changed_since_is_not_reverted(installed: Installation) -> None:
    installed.patch.apply()
    installed.first.write_text(installed.first.read_text() + "my own change\n")
    with pytest.raises(PatchError, match=r"is not what .*before-engine-loader holds"):
        installed.patch.revert()
    installed.first.write_text("something else\n")
    with pytest.raises(PatchError, match=r"first\.py was changed since"):
        installed.patch.revert()
    assert installed.second.read_text().startswith("line 0\n")


@pytest.mark.parametrize("version", ["1.1", "1.3.0"])
def test_another_version_is_refused_by_its_number(installed: Installation, version: str) -> None:
    installed.version(version)
    assert installed.patch.state() == "for another version"
    with pytest.raises(PatchError, match=rf"and {version} is installed"):
        installed.patch.apply()


def test_the_command_lists_checks_applies_and_reverts(installed: Installation) -> None:
    name = installed.patch.name

    def run(*args: str) -> tuple[int, str]:
        done = CliRunner().invoke(app, ["patch", *args])
        return done.exit_code, done.output

    status, output = run("list")
    assert (status, "1.2.7 is installed: can be applied" in output) == (0, True)
    status, output = run("list", "--json")
    assert (status, json.loads(output)) == (
        0,
        [
            {
                "name": name,
                "title": "Number the lines otherwise.".rstrip("."),
                "distribution": "fake-engine",
                "versions": "<1.3,>=1.2",
                "installed": "1.2.7",
                "state": "can be applied",
            }
        ],
    )
    assert run("check") == (0, f"{name}: can be applied\n")
    status, output = run("apply", name)
    assert (status, f"changed {installed.first}" in output) == (0, True)
    assert run("check", name) == (0, f"{name}: applied\n")
    status, output = run("apply", name)
    assert (status, "is applied already" in output) == (0, True)
    status, output = run("revert", name)
    assert (status, f"restored {installed.second}" in output) == (0, True)
    installed.first.write_text("something else\n")
    assert run("check") == (1, f"{name}: differs\n")
    status, output = run("apply", name)
    assert (status, "nothing was changed" in output) == (1, True)
    status, output = run("apply", "no-such-patch")
    assert (status, name in output) == (1, True)


def test_the_patches_of_this_package_are_whole() -> None:
    patches = {patch.name: patch for patch in all_patches()}
    assert {"sglang-0.5.9-plugin", "sglang-0.5.10-plugin", "vllm-0.32-aot-finalize"} <= set(patches)
    for patch in patches.values():
        assert all(hunk.old != hunk.new for file in patch.files for hunk in file.hunks)
    for name in ("sglang-0.5.9-plugin", "sglang-0.5.10-plugin"):
        added = ["".join(hunk.new).count("register()\n") for file in patches[name].files for hunk in file.hunks]
        assert added == [1, 1, 1, 1]
        assert "0.5.11" not in patches[name].versions
