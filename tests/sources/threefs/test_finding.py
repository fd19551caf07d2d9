"""Which library is found, which files are on 3FS, and what `auto` makes of it."""

import ctypes
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from engine_loader import CheckpointError
from engine_loader.cli.diagnosis.file_systems import check_3fs, check_paths
from engine_loader.sources.registry import make_source
from engine_loader.sources.threefs import shared_library
from engine_loader.sources.threefs.daemon import VisibleDaemon, find_daemon
from engine_loader.sources.threefs.discovery import find_client, is_available, why_not
from engine_loader.sources.threefs.shared_library import (
    LIBRARY_NAME,
    ThreeFsError,
    check_mount,
    find_library,
    load_library,
    mounts,
)
from engine_loader.sources.threefs.threefs_source import ThreeFsFile, ThreeFsSource, fit_io_bytes
from tests.support.checkpoints import checkpoint, entry
from tests.support.resources import left_open, open_resources
from tests.support.threefs import Emulator


def test_the_places_are_tried_in_the_known_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("first", "second", "hf3fs_py_usrbio.libs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / LIBRARY_NAME).touch()
    (tmp_path / "hf3fs_py_usrbio").mkdir()
    (tmp_path / "hf3fs_py_usrbio" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    environ = {"HF3FS_LIB_DIR": str(tmp_path / "first"), "LD_LIBRARY_PATH": f"/no/such:{tmp_path / 'second'}"}
    assert find_library(environ=environ).path == tmp_path / "first" / LIBRARY_NAME
    del environ["HF3FS_LIB_DIR"]
    search = find_library(environ=environ)
    assert (search.path, search.origin) == (tmp_path / "second" / LIBRARY_NAME, "LD_LIBRARY_PATH")
    beside = find_library(environ={})
    assert (beside.path, beside.origin) == (tmp_path / "hf3fs_py_usrbio.libs" / LIBRARY_NAME, "hf3fs_py_usrbio")
    assert find_library(str(tmp_path / "first"), environ).origin == "HF3FS_LIB_DIR"


@pytest.mark.parametrize("where", ["", "hf3fs_py_usrbio", "hf3fs_py_usrbio/lib"])
def test_the_library_is_found_where_wheels_put_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Beside the extension in site-packages, in the package, or in its lib."""
    (tmp_path / "hf3fs_py_usrbio" / "lib").mkdir(parents=True)
    (tmp_path / "hf3fs_py_usrbio" / "__init__.py").touch()
    (tmp_path / where / LIBRARY_NAME).touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    found = find_library(environ={})
    assert (found.path, found.origin) == (tmp_path / where / LIBRARY_NAME, "hf3fs_py_usrbio")


def test_the_library_is_found_where_dlopen_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "ld.so.cache"
    cache.write_bytes(b"glibc-ld.so.cache1.1\0libc.so.6\0/lib/libc.so.6\0/opt/3fs/libhf3fs_api_shared.so\0")
    monkeypatch.setattr(shared_library, "_LOADER_CACHE", cache)
    shared_library._library_of_loader.cache_clear()
    try:
        assert find_library(environ={}).path == Path("/opt/3fs/libhf3fs_api_shared.so")
        cache.write_bytes(b"glibc-ld.so.cache1.1\0libc.so.6\0/lib/libc.so.6\0")
        shared_library._library_of_loader.cache_clear()
        assert find_library(environ={}).path is None
    finally:
        shared_library._library_of_loader.cache_clear()


_LIMITED = """
import resource, sys
from pathlib import Path
from unittest.mock import patch
from engine_loader.sources.threefs import shared_library
shared_library.MOST_DESCRIPTORS = 2000
if sys.argv[2] == "refused":
    shared_library.resource.setrlimit = lambda *_: (_ for _ in ()).throw(ValueError("not allowed"))
try:
    library = shared_library.load_library(Path(sys.argv[1]))
except shared_library.ThreeFsError as error:
    sys.exit(str(error))
print(resource.getrlimit(resource.RLIMIT_NOFILE)[1], len(library.calls.hf3fs_is_hf3fs.argtypes))
"""


def test_the_hard_limit_of_open_files_is_lowered_before_the_library_is_loaded(emulator: Emulator) -> None:
    command = [sys.executable, "-c", _LIMITED, str(emulator.library)]
    lowered = subprocess.run([*command, "allowed"], check=True, capture_output=True, text=True)
    assert lowered.stdout == "2000 1\n"
    refused = subprocess.run([*command, "refused"], check=False, capture_output=True, text=True)
    assert "start with `ulimit -Hn 2000`" in refused.stderr


def test_the_library_serves_no_other_one(emulator: Emulator) -> None:
    """Its symbols are not in the global scope, where folly and fmt would take over those of other libraries."""
    with pytest.raises(AttributeError):
        ctypes.CDLL(None).hf3fs_emulator_count  # noqa: B018


def test_a_removed_file_does_not_end_the_process(emulator: Emulator, path: Path) -> None:
    with path.open("rb") as opened:
        assert emulator.loaded.mount_of(opened.fileno()) == str(emulator.mount)
        path.unlink()
        assert emulator.loaded.mount_of(opened.fileno()) is None


@pytest.mark.parametrize(("namespace", "tells_apart"), [("pid:[1]", True), ("pid:[2]", False)])
def test_a_daemon_in_a_pid_namespace_below_sees_no_thread_ids(
    tmp_path: Path, namespace: str, tells_apart: bool
) -> None:
    for process, command, own in (("self", "python", "pid:[1]"), ("7", "hf3fs_fuse_main", namespace)):
        (tmp_path / process / "ns").mkdir(parents=True)
        (tmp_path / process / "ns" / "pid").symlink_to(own)
        (tmp_path / process / "comm").write_text(f"{command}\n")
    assert find_daemon(tmp_path) == VisibleDaemon(7, tells_apart)
    assert find_daemon() is None


def test_a_search_in_vain_names_every_place() -> None:
    search = find_library(environ={"HF3FS_LIB_DIR": "/a", "LD_LIBRARY_PATH": "/b:/c"})
    assert search.path is None
    for place in ("HF3FS_LIB_DIR: not in /a", "not in /b", "not in /c", "hf3fs_py_usrbio is not installed"):
        assert place in search.explain()
    assert "HF3FS_LIB_DIR is not set" in find_library(environ={}).explain()


def test_a_library_that_is_none_is_an_error(tmp_path: Path) -> None:
    (tmp_path / LIBRARY_NAME).write_text("not a library")
    with pytest.raises(ThreeFsError, match="cannot be used"):
        load_library(tmp_path / LIBRARY_NAME)
    assert not is_available(lib_dir=str(tmp_path))


def test_available_only_where_a_read_would_work(
    emulator: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert is_available()
    assert is_available(str(emulator.mount))
    assert why_not(str(tmp_path)) == f"{tmp_path} is not on 3FS"
    assert "No such file" in str(why_not(str(tmp_path / "missing")))
    emulator.set("dead=1")
    assert not is_available()
    emulator.set("reset")
    monkeypatch.delenv("HF3FS_EMULATOR_MOUNT")
    assert why_not() == "no 3FS is mounted on this machine"
    monkeypatch.delenv("HF3FS_LIB_DIR")
    assert "HF3FS_LIB_DIR is not set" in str(why_not())


def test_a_mount_without_its_directory_for_buffers_is_told(tmp_path: Path) -> None:
    assert "3fs-virt/iovs is missing" in str(check_mount(str(tmp_path)))
    assert "longer than the 255 bytes" in str(check_mount("/" + "x" * 255))


def test_mounts_are_read_from_the_mount_table(tmp_path: Path) -> None:
    table = tmp_path / "mountinfo"
    table.write_text(
        "20 1 0:1 / / rw - ext4 /dev/vda rw\n"
        "21 1 0:2 / /mnt/3\\040fs rw,nosuid - fuse.hf3fs hf3fs.cluster rw\n"
        "22 1 0:3 / /sub/3fs-virt rw shared:1 - fuse.hf3fs hf3fs.cluster rw\n"
    )
    assert mounts(table) == ["/mnt/3 fs", "/sub"]


def test_auto_takes_usrbio_on_3fs_and_says_so(emulator: Emulator, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    source = make_source("auto")
    assert source.name == "posix"
    file = source.open(str(path))
    assert isinstance(file, ThreeFsFile)
    assert (file.remote, file.mappable) == (False, False)
    access = file.native_access
    assert access is not None
    assert (access.library, access.mount) == (str(emulator.library), str(emulator.mount))
    assert (access.rings, access.depth, access.deadline_s) == (None, 16, 90.0)
    assert access.io_bytes == fit_io_bytes(4 << 20, path.stat().st_blksize)
    file.close()
    assert source.name == "usrbio"
    assert f"files on the 3FS mount {emulator.mount} are read by USRBIO ({emulator.library})" in caplog.text


def test_auto_takes_posix_elsewhere(emulator: Emulator, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    source = make_source("auto")
    file = source.open(str(tmp_path / "file"))
    assert (file.source, source.name) == ("posix", "posix")
    file.close()


def test_auto_says_why_a_file_on_3fs_is_read_through_the_mount(
    emulator: Emulator, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    iovs = emulator.mount / "3fs-virt" / "iovs"
    iovs.rmdir()
    try:
        source = make_source("auto")
        source.open(str(path)).close()
    finally:
        iovs.mkdir()
    assert "is read through its mount" in caplog.text
    assert "3fs-virt/iovs is missing" in source.name


def test_asked_for_and_not_to_be_had_is_an_error(
    emulator: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="file: backend usrbio cannot read this file: it is not on 3FS"):
        make_source("usrbio").open(str(tmp_path / "file"))
    monkeypatch.delenv("HF3FS_LIB_DIR")
    with pytest.raises(CheckpointError, match="HF3FS_LIB_DIR is not set; LD_LIBRARY_PATH is not set"):
        make_source("usrbio")


@pytest.mark.usefixtures("only_binding")
def test_the_binding_serves_where_only_that_is_there(path: Path, tmp_path: Path) -> None:
    assert find_client().name == "hf3fs_py_usrbio"
    file = ThreeFsSource().open(str(path))
    assert (file.fileno(), file.native_access) == (None, None), "native threads would read it through the mount unseen"
    file.close()
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="it is not on 3FS"):
        ThreeFsSource().open(str(tmp_path / "file"))


def test_descriptors_are_registered_while_a_file_is_open(emulator: Emulator, path: Path) -> None:
    source = ThreeFsSource()
    files = [source.open(str(path)) for _ in range(3)]
    assert emulator.count("registrations") == 3
    for file in files:
        file.close()
        file.close()
    assert emulator.count("registrations") == 0


def test_a_refused_registration_is_told(emulator: Emulator, path: Path) -> None:
    emulator.set("register_error=24")
    before = open_resources()
    with pytest.raises(CheckpointError, match=r"model.bin: 3FS does not take .*every registered file takes two"):
        ThreeFsSource().open(str(path))
    assert left_open(before) == []


@pytest.mark.parametrize(
    ("wanted", "chunk", "expected"),
    [
        (4 << 20, 4096, 4 << 20),
        (4 << 20, 512 << 10, 4 << 20),
        (4 << 20, 3 << 19, 3 << 20),
        (4 << 20, 16 << 20, 4 << 20),
        (4 << 20, 6 << 20, 3 << 20),
    ],
)
def test_ios_are_cut_at_chunks(wanted: int, chunk: int, expected: int) -> None:
    assert fit_io_bytes(wanted, chunk) == expected


def test_doctor_says_what_stands_between_a_file_and_usrbio(emulator: Emulator, tmp_path: Path) -> None:
    model = emulator.mount / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(checkpoint({"x": entry("U8", [5])}))
    iovs = emulator.mount / "3fs-virt" / "iovs"
    try:
        found = {finding.name: finding for finding in (*check_3fs(), *check_paths([str(model)]))}
        assert found["usrbio"].status == "ok"
        assert found["usrbio"].value == (f"mounted at {emulator.mount}; {emulator.library}, found by HF3FS_LIB_DIR")
        assert found[f"usrbio on {model}"].value == "backend: auto reads these files by USRBIO"
        iovs.rmdir()
        found = {finding.name: finding for finding in (*check_3fs(), *check_paths([str(model)]))}
        for name in ("usrbio", f"usrbio on {model}"):
            assert found[name].status == "warn"
            assert "3fs-virt/iovs is missing" in found[name].value
    finally:
        iovs.mkdir(exist_ok=True)
        shutil.rmtree(model)
    (tmp_path / "model.safetensors").write_bytes(checkpoint({"x": entry("U8", [5])}))
    assert not [finding for finding in check_paths([str(tmp_path)]) if finding.name.startswith("usrbio")]
