"""The list of .so and .pyc files that a start leaves: what is in it, and whose is believed."""

import json
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from engine_loader.start import opened_files
from engine_loader.start.opened_files import list_name, note_opened, noted, opened_here, read_list, write_list
from tests.support.children import in_child


def module(name: str, **names: object) -> ModuleType:
    made = ModuleType(name)
    vars(made).update(names)
    return made


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """Name -> path of files of two packages."""
    paths = {}
    for name in ("one/a.pyc", "one/b.so", "one.libs/libone.so.3", "two/c.pyc", "two/lib/libtwo.so", "two/d.py"):
        path = tmp_path / "site-packages" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
        paths[path.name] = str(path)
    return paths


def test_modules_are_in_the_order_of_their_import_and_libraries_before_those_of_their_package(
    files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    mapped = ["/lib/libc.so.6", files["libtwo.so"], files["b.so"], files["libone.so.3"]]
    monkeypatch.setattr(opened_files, "_below", lambda pid: [pid])
    monkeypatch.setattr(opened_files, "_mapped", lambda pid: mapped)
    modules = {
        "two": module("two", __cached__=files["c.pyc"], __file__=files["d.py"]),
        "one": module("one", __spec__=SimpleNamespace(cached=files["a.pyc"])),
        "one.b": module("one.b", __file__=files["b.so"], __cached__="/missing/b.pyc"),
    }
    expected = ["/lib/libc.so.6", *(files[name] for name in ("libtwo.so", "c.pyc", "libone.so.3", "a.pyc", "b.so"))]
    assert opened_here(modules) == expected


def test_modules_are_asked_for_nothing_that_they_make_up(files: dict[str, str]) -> None:
    class Lazy(ModuleType):
        def __getattr__(self, name: str) -> object:
            raise AssertionError(name)

    class Odd:
        __slots__ = ()

    modules = {
        "lazy": Lazy("lazy"),
        "odd": Odd(),
        "none": None,
        "wrong": module("wrong", __cached__=5, __file__="relative.so"),
        "gone": module("gone", __cached__="/missing/gone.pyc"),
        "builtin": sys,
        "two": module("two", __cached__=files["c.pyc"]),
    }
    found = opened_here(modules)
    assert [path for path in found if path.endswith(".pyc")] == [files["c.pyc"]]


def test_what_this_process_and_those_below_it_have_mapped_is_found(tmp_path: Path) -> None:
    found = opened_here()
    assert any("/libc.so.6" in path or "/libpython" in path or "/libm.so" in path for path in found)
    assert all(os.path.isabs(path) for path in found)
    cached = opened_files.__spec__.cached if opened_files.__spec__ is not None else None
    assert cached is not None
    assert (cached in found) == os.path.isfile(cached)


def test_a_list_is_for_this_user_alone_and_replaces_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "opened.json"
    before = os.umask(0)
    try:
        write_list(path, ["/a/b.pyc", "/a/c.so"])
        write_list(path, ["/a/b.pyc", "/a/c.so.1.2", "/a/\udcff.so"])
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_list(path) == ["/a/b.pyc", "/a/c.so.1.2", "/a/\udcff.so"]
    assert list(tmp_path.iterdir()) == [path]


def test_a_list_has_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "opened.json"
    monkeypatch.setattr(opened_files, "MOST_FILES", 3)
    write_list(path, (f"/{number}.so" for number in range(9)))
    assert read_list(path) == ["/0.so", "/1.so", "/2.so"]
    monkeypatch.setattr(opened_files, "MOST_LIST_BYTES", 24)
    write_list(path, (f"/{number}.so" for number in range(3)))
    assert read_list(path) == ["/0.so", "/1.so"]
    assert path.stat().st_size <= 24


def test_a_list_that_cannot_be_written_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "opened.json"
    write_list(path, ["/a.so"])

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        write_list(path, ["/b.so"])
    assert read_list(path) == ["/a.so"]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[" * 100_000,
        b"{}",
        b'["/a.so", 5]',
        b'["relative.so"]',
        b'["/etc/shadow"]',
        b'["/a\\u0000.so"]',
        b'["/dev/zero"]',
        b"\xff\xfe",
    ],
)
def test_a_list_with_anything_else_in_it_is_not_believed(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "opened.json"
    path.write_bytes(content)
    path.chmod(0o600)
    assert read_list(path) == []


def test_one_that_is_too_large_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "opened.json"
    write_list(path, ["/a.so", "/b.so"])
    monkeypatch.setattr(opened_files, "MOST_LIST_BYTES", path.stat().st_size - 1)
    assert read_list(path) == []
    monkeypatch.undo()
    monkeypatch.setattr(opened_files, "MOST_FILES", 1)
    assert read_list(path) == []


def made_writable(path: Path) -> None:
    path.chmod(0o622)


def made_a_link(path: Path) -> None:
    path.rename(path.with_name("other"))
    path.symlink_to("other")


def made_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path, 0o600)


def made_a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("spoil", [made_writable, made_a_link, made_a_pipe, made_a_directory, Path.unlink])
def test_one_that_others_may_have_made_is_not_believed(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    path = tmp_path / "opened.json"
    write_list(path, ["/a.so"])
    assert read_list(path) == ["/a.so"]
    spoil(path)
    assert read_list(path) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_that_of_another_user_is_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "opened.json"
    write_list(path, ["/a.so"])
    os.chown(path, 65534, 65534)
    assert read_list(path) == []


def test_a_list_holds_for_one_interpreter_and_one_version() -> None:
    names = {list_name("vllm", "0.32"), list_name("vllm", "0.33"), list_name("sglang", "0.32")}
    assert len(names) == 3
    assert list_name("vllm", "0.32") in names
    assert all(name.startswith("opened-") and name.endswith(".json") for name in names)


def test_each_process_of_a_start_leaves_its_own(tmp_path: Path) -> None:
    note_opened(tmp_path)
    mine = noted(tmp_path)

    def other() -> list[str]:
        write_list(tmp_path / f"opened-{os.getpid()}.json", ["/other/x.so", mine[0]])
        return noted(tmp_path)

    both = in_child(other)
    assert sorted(both) == sorted([*mine, "/other/x.so"])
    (tmp_path / "opened-1.json").write_text(json.dumps(["/etc/passwd"]))
    assert len(noted(tmp_path)) == len(both)
