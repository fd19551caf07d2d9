"""Which source reads a path, and what the files of each source say of themselves."""

from pathlib import Path
from typing import get_args

import pytest

from engine_loader import CheckpointError
from engine_loader.settings import LoaderSettings
from engine_loader.sources import registry
from engine_loader.sources.registry import is_remote, make_source, remote_backend


@pytest.mark.parametrize("path", ["s3://bucket/a", "gs://bucket", "az://container/a//", "s3:/bucket/a", "s3://"])
def test_urls_of_object_stores_are_remote(path: str) -> None:
    assert is_remote(path)
    assert remote_backend(path) == "object_store"


@pytest.mark.parametrize("path", ["/models/a", "models", "", "s3:", "s3:/", "http://host/a", "/x/s3://bucket/a", "S3"])
def test_other_paths_are_files(path: str) -> None:
    assert not is_remote(path)
    assert remote_backend(path) is None


def test_a_backend_that_there_is_not_is_an_error_that_names_those_that_there_are() -> None:
    with pytest.raises(CheckpointError, match=r"no backend 'ftp'.*auto, posix, usrbio, object_store, memory"):
        make_source("ftp")


def test_every_backend_of_the_settings_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF3FS_LIB_DIR", raising=False)
    names = get_args(LoaderSettings.model_fields["backend"].annotation)
    assert set(names) == {"auto", "posix", "usrbio", "object_store"}
    assert make_source("posix").name == make_source("auto").name == "posix"
    assert make_source("object_store").name == "object_store"
    with pytest.raises(CheckpointError, match="backend usrbio"):
        make_source("usrbio")


def test_content_goes_with_the_memory_source_only() -> None:
    for backend in ("memory", "auto"):
        assert make_source(backend, {"a": b"123"}).open("a").size == 3
    with pytest.raises(CheckpointError, match="files= goes with backend='memory', not with 'posix'"):
        make_source("posix", {"a": b"123"})
    with pytest.raises(CheckpointError, match="no such file in memory"):
        make_source("memory").open("a")


def test_files_of_the_kernel_can_be_mapped_and_those_in_memory_cannot(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"123")
    on_disk = make_source("posix").open(str(tmp_path / "a"))
    assert (on_disk.remote, on_disk.mappable, on_disk.native_access) == (False, True, None)
    assert on_disk.fileno() is not None
    on_disk.close()
    in_memory = make_source("memory", {"a": b"123"}).open("a")
    assert (in_memory.remote, in_memory.mappable, in_memory.native_access) == (False, False, None)
    assert in_memory.fileno() is None


def test_a_new_source_is_one_line_for_its_name_and_one_for_its_urls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._SOURCES, "new", ".memory:MemorySource")
    monkeypatch.setitem(registry._SCHEMES, "new", "new")
    assert make_source("new").name == "memory"
    assert is_remote("new://a")
    with pytest.raises(CheckpointError, match="no such file in memory"):
        make_source("auto").open("new://a")
