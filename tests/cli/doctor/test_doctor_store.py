"""The doctor tries what a save of the compile cache needs of its store."""

import errno
import json
import os
import re
from pathlib import Path

import pytest

from engine_loader.cli.diagnosis import cache_sharing
from engine_loader.cli.diagnosis.finding import Finding
from tests.support.moto_server import MotoServer


def finding(store: Path, monkeypatch: pytest.MonkeyPatch, **settings: object) -> Finding:
    monkeypatch.setenv("ENGINE_LOADER_COMPILE_CACHE__DIRECTORY", str(store))
    for name, value in settings.items():
        monkeypatch.setenv(f"ENGINE_LOADER_COMPILE_CACHE__{name.upper()}", str(value))
    return next(found for found in cache_sharing.check_compile_cache() if found.name == "store")


def test_one_that_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = finding(tmp_path / "store", monkeypatch, min_store_free_bytes=0)
    assert found.status == "ok"
    assert "0 packs" in found.value
    assert list(tmp_path.iterdir()) == []


def test_one_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = finding(tmp_path, monkeypatch, min_store_free_bytes=1 << 50)
    assert found.status == "fail"
    assert "are to stay free (compile_cache.min_store_free_bytes)" in found.value
    assert finding(tmp_path, monkeypatch, read_only="true").status == "ok"


def test_one_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    found = finding(tmp_path / "file" / "store", monkeypatch)
    assert found.status == "fail"
    variable = "ENGINE_LOADER_COMPILE_CACHE__DIRECTORY"
    assert found.value == (
        f"compile_cache.directory (set by {variable}) is {tmp_path}/file/store, and {tmp_path}/file is a file, not a "
        "directory: name another directory there"
    )
    assert found.repair == (
        "no engine starts with --load-format b10_3fs until this is repaired, or the cache is switched off: "
        "ENGINE_LOADER_COMPILE_CACHE__ENABLED=false"
    )
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    assert (
        f"and {tmp_path}/link is a link that leads to no directory: "
        in finding(tmp_path / "link" / "store", monkeypatch).value
    )


@pytest.mark.servers
def test_one_in_a_bucket_is_written_read_and_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    with MotoServer() as moto:
        moto.make_bucket("bucket")
        values = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_ENDPOINT_URL": moto.url}
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        for bucket, status in (("bucket", "ok"), ("no-bucket", "fail")):
            monkeypatch.setenv("ENGINE_LOADER_COMPILE_CACHE__DIRECTORY", f"s3://{bucket}/caches")
            monkeypatch.setenv("ENGINE_LOADER_COMPILE_CACHE__TRUST", "anyone")
            found = next(found for found in cache_sharing.check_compile_cache() if found.name == "store")
            assert found.status == status, found
            if status == "ok":
                assert " ms to write, read and delete, " in found.value
                assert b"<Key>" not in moto.request("GET", "/bucket?list-type=2")


def test_one_on_a_disk_is_written_read_and_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "store").mkdir()
    found = finding(tmp_path / "store", monkeypatch, min_store_free_bytes=0)
    assert found.status == "ok"
    assert re.search(r" ms to write, read and delete, [\d.]+ [KMGT]iB free, ", found.value), found
    assert "to write" not in finding(tmp_path / "store", monkeypatch, read_only="true").value
    assert list((tmp_path / "store").iterdir()) == []


def test_one_on_a_disk_that_fills_up_or_gives_other_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        found = finding(tmp_path, monkeypatch, min_store_free_bytes=0)
    assert found.status == "fail"
    assert "No space left on device" in found.value
    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", lambda path: b"other bytes")
        found = finding(tmp_path, monkeypatch, min_store_free_bytes=0)
    assert found.status == "fail"
    assert f"{tmp_path}/" in found.value and "other bytes were read than had been written" in found.value
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("url", "named", "variables"),
    [
        (
            "s3://bucket/caches",
            "AWS_ENDPOINT_URL",
            {
                "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
                "AWS_ACCESS_KEY_ID": "x",
                "AWS_SECRET_ACCESS_KEY": "y",
            },
        ),
        (
            "gs://bucket/caches",
            "object_store_endpoint_url",
            {
                "GOOGLE_SERVICE_ACCOUNT_KEY": json.dumps(
                    {
                        "gcs_base_url": "https://127.0.0.1:9",
                        "disable_oauth": True,
                        "client_email": "",
                        "private_key": "",
                        "private_key_id": "",
                    }
                )
            },
        ),
        (
            "az://container/caches",
            "the account's name",
            {
                "AZURE_STORAGE_ACCOUNT_NAME": "account",
                "AZURE_STORAGE_ACCOUNT_KEY": "eHh4",
                "AZURE_STORAGE_ENDPOINT": "https://127.0.0.1:9",
            },
        ),
    ],
)
def test_one_that_does_not_answer_is_tried_twice_and_told_with_its_own_names(
    url: str, named: str, variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("ENGINE_LOADER_COMPILE_CACHE__DIRECTORY", url)
    monkeypatch.setenv("ENGINE_LOADER_COMPILE_CACHE__TRUST", "anyone")
    found = next(found for found in cache_sharing.check_compile_cache() if found.name == "store")
    assert found.status == "fail"
    assert found.value == f"{url}: could not list the store: the server cannot be reached after 2 tries"
    assert named in found.repair
    assert found.repair.endswith("engines start without a compile cache until this is repaired")


def test_azure_without_an_account(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AZURE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("ENGINE_LOADER_COMPILE_CACHE__DIRECTORY", "az://container/caches")
    monkeypatch.setenv("ENGINE_LOADER_COMPILE_CACHE__TRUST", "anyone")
    found = next(found for found in cache_sharing.check_compile_cache() if found.name == "store")
    assert found.status == "fail"
    assert "AZURE_STORAGE_ACCOUNT_NAME must be set" in found.value
