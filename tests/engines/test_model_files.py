"""A model in a bucket: what is no weights is fetched once, by ETag, complete or not at all, and serves offline too."""

import json
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import obstore
import pytest
from obstore.store import S3Store

from engine_loader import CheckpointError
from engine_loader.engines.common import model_files
from engine_loader.engines.common.model_files import local_copy
from engine_loader.settings import LoaderSettings, load_settings
from tests.support.moto_server import MotoServer

pytestmark = pytest.mark.servers

SMALL = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}" * 5000,
    "1_Pooling/config.json": b'{"pooling": true}',
    "modeling_own.py": b"class Model: pass\n",
}
NOT_FETCHED = {
    "model.safetensors": b"weights",
    "model.safetensors.index.json": b"{}",
    "pytorch_model.bin": b"weights",
    "._config.json": b"of macOS",
    "original/params.json": b"{}",
    "onnx/model.onnx": b"weights",
}


@pytest.fixture(scope="module")
def moto() -> Iterator[MotoServer]:
    with MotoServer() as server:
        server.put("models", {"empty/readme.txt": b"no model"})
        yield server


class Bucket:
    """A model of its own for each test."""

    def __init__(self, moto: MotoServer, name: str) -> None:
        self.url = f"s3://models/{name}"
        self._key = f"{name}/config.json"
        self._moto = moto
        moto.put("models", {f"{name}/{path}": content for path, content in {**SMALL, **NOT_FETCHED}.items()})

    def change(self, config: bytes) -> None:
        """Signed: moto lets nobody else overwrite an object."""
        store = S3Store(
            "models",
            endpoint=self._moto.url,
            region="us-east-1",
            access_key_id="test",
            secret_access_key="test",
            client_options={"allow_http": True},
        )
        obstore.put(store, self._key, config)


@pytest.fixture
def bucket(moto: MotoServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Bucket:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto.url)
    return Bucket(moto, tmp_path.name)


def settings() -> LoaderSettings:
    return load_settings({"object_store_timeout_s": 2, "max_tries": 2}).settings.loader


def content(directory: str) -> dict[str, bytes]:
    root = Path(directory)
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_everything_but_weights_is_fetched_once_for_each_state_of_the_bucket(bucket: Bucket) -> None:
    first = local_copy(bucket.url, settings())
    assert content(first) == SMALL
    before = os.stat(Path(first, "config.json")).st_ino
    assert local_copy(f"{bucket.url}/", settings()) == first
    assert os.stat(Path(first, "config.json")).st_ino == before, "it was fetched again"

    bucket.change(b'{"model_type": "other"}')
    second = local_copy(bucket.url, settings())
    assert second != first
    assert json.loads(content(second)["config.json"]) == {"model_type": "other"}
    assert content(first) == SMALL, "an engine that runs still reads it"

    bucket.change(SMALL["config.json"])
    assert local_copy(bucket.url, settings()) == first


def test_old_copies_go(bucket: Bucket) -> None:
    copies = []
    for number in range(model_files._KEPT + 2):
        bucket.change(json.dumps({"number": number}).encode())
        copies.append(Path(local_copy(bucket.url, settings())))
    assert [path.exists() for path in copies] == [False, False, *[True] * model_files._KEPT]


def test_a_start_without_the_store_takes_the_last_copy_and_says_so(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = local_copy(bucket.url, settings())
    bucket.change(b'{"model_type": "other"}')
    second = local_copy(bucket.url, settings())
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with caplog.at_level(logging.WARNING):
        assert local_copy(bucket.url, settings()) == second != first
    assert "configuration and tokenizer are those of an earlier start" in caplog.text
    with pytest.raises(CheckpointError):
        local_copy("s3://models/never-seen", settings())


@pytest.mark.parametrize(
    ("url", "told"), [("s3://models/none", "there is no object"), ("s3://models/empty", "this is not a model")]
)
def test_what_is_no_model_is_refused(url: str, told: str, bucket: Bucket, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=told):
        local_copy(url, settings())
    assert not content(str(tmp_path / "cache"))


def test_a_fetch_that_fails_leaves_nothing(bucket: Bucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    read, calls = model_files.read_small_file, []

    def failing(source: object, path: str) -> bytes:
        calls.append(path)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return read(source, path)  # type: ignore[arg-type]

    monkeypatch.setattr(model_files, "read_small_file", failing)
    with pytest.raises(OSError, match="No space left"):
        local_copy(bucket.url, settings())
    assert not content(str(tmp_path / "cache"))
    assert content(local_copy(bucket.url, settings())) == SMALL


def test_several_at_once_get_the_same_complete_copy(bucket: Bucket, tmp_path: Path) -> None:
    with ThreadPoolExecutor(6) as pool:
        copies = {future.result() for future in [pool.submit(local_copy, bucket.url, settings()) for _ in range(6)]}
    (copy,) = copies
    assert content(copy) == SMALL
    assert [path.name for path in Path(copy).parent.iterdir()] == [Path(copy).name]


@pytest.fixture
def temporary(bucket: Bucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The temporary directory of a user whose home cannot be written."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(model_files.tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    return tmp_path / "tmp"


def test_a_home_that_cannot_be_written_is_not_needed(bucket: Bucket, temporary: Path) -> None:
    assert content(local_copy(bucket.url, settings())) == SMALL


def test_a_directory_that_somebody_else_made_first_is_not_used(bucket: Bucket, temporary: Path) -> None:
    """What lies there would be taken for the model's configuration, and engines may run code that it names."""
    planted = temporary / f"engine_loader-{os.getuid()}"
    planted.mkdir()
    planted.chmod(0o777)
    with pytest.raises(CheckpointError, match="others may write it"):
        local_copy(bucket.url, settings())
    assert list(planted.rglob("*.json")) == []
