"""What goes wrong with a checkpoint in S3: the old one stays, nothing is half there, each damage is one clear error."""

import gc
import os
import pickle
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from torch.distributed.checkpoint.api import CheckpointException

from engine_loader import CheckpointError, dcp
from engine_loader.dcp import S3ClientConfig, S3FileSystem, S3StorageWriter
from engine_loader.dcp.s3_upload import ObjectUpload
from engine_loader.sources.object_store.client import ObjectStoreOptions, make_client
from engine_loader.sources.object_store.url import parse_object_url
from tests.support.fault_server import Answer, FaultServer, Request

from ..states import blank, same
from .buckets import REGION, load, save

URL = "s3://bucket/run/step-1"
KEY = "bucket/run/step-1"
STATE = {"a": torch.arange(6000.0).reshape(60, 100), "b": torch.ones(5), "step": 4}
OTHER = {"a": torch.full((60, 100), 7.0), "b": torch.zeros(5), "step": 5}
MIB = 1 << 20
BIG = {"a": torch.zeros(13 * MIB, dtype=torch.uint8)}


@pytest.fixture(autouse=True)
def _saved(on_server: FaultServer) -> None:
    save(STATE, URL)


def config(**options: Any) -> S3ClientConfig:
    return S3ClientConfig(max_attempts=2, **options)


def failure(call: Callable[[], object]) -> str:
    with pytest.raises((CheckpointException, CheckpointError)) as raised:
        call()
    return str(raised.value)


def load_failure() -> str:
    return failure(lambda: load(blank(STATE), URL, s3client_config=config()))


class TestLoading:
    def test_a_missing_object(self, server: FaultServer) -> None:
        del server.objects[f"{KEY}/__0_0.distcp"]
        assert f"{URL}/__0_0.distcp: could not open the object: there is no such object" in load_failure()

    def test_no_checkpoint(self, server: FaultServer) -> None:
        server.objects.clear()
        assert f"{URL}/.metadata: could not open the object: there is no such object" in load_failure()

    def test_an_object_that_was_cut_short(self, server: FaultServer) -> None:
        server.objects[f"{KEY}/__0_0.distcp"] = server.objects[f"{KEY}/__0_0.distcp"][:-200]
        told = load_failure()
        assert f"{URL}/__0_0.distcp: at byte " in told
        assert "but the file ends after" in told

    def test_an_object_with_other_bytes(self, server: FaultServer) -> None:
        server.objects[f"{KEY}/__0_0.distcp"] = b"x" * len(server.objects[f"{KEY}/__0_0.distcp"])
        assert "cannot be read as a tensor" in load_failure() or "refuses it" in load_failure()

    def test_an_object_of_another_save(self, server: FaultServer) -> None:
        save({**STATE, "a": torch.zeros(61, 99)}, "s3://bucket/other")
        content = server.objects["bucket/other/__0_0.distcp"]
        server.objects[f"{KEY}/__0_0.distcp"] = content.ljust(len(server.objects[f"{KEY}/__0_0.distcp"]), b"\0")
        told = load_failure()
        assert "metadata and files are of different saves" in told or "copy the checkpoint again" in told

    def test_an_object_that_is_replaced_while_it_is_read(self, server: FaultServer) -> None:
        content = server.objects[f"{KEY}/__0_0.distcp"]

        def fault(request: Request) -> Answer | None:
            if request.method == "GET" and request.key.endswith("distcp") and request.number == 1:
                server.objects[request.key] = content + b"x"
            return None

        server.fault = fault
        assert "the object was replaced while it was read" in load_failure()

    @pytest.mark.parametrize("hostile", ["top", "key"])
    def test_hostile_metadata_runs_nothing(self, hostile: str, server: FaultServer, tmp_path: Any) -> None:
        class Runs:
            def __reduce__(self) -> Any:
                return (os.mkdir, (str(tmp_path / "was-run"),))

        server.objects[f"{KEY}/.metadata"] = pickle.dumps(Runs() if hostile == "top" else {"a": [Runs()]})
        told = load_failure()
        assert f"{URL}/.metadata: the metadata names 'posix.mkdir', which no checkpoint needs" in told
        assert not (tmp_path / "was-run").exists()

    def test_access_denied(self, server: FaultServer) -> None:
        server.fault = lambda request: Answer(status=403, code="AccessDenied")
        assert f"{URL}/.metadata: could not open the object: access was denied (403 AccessDenied)" in load_failure()

    @pytest.mark.parametrize("answer", [Answer(status=503, code="SlowDown"), Answer(cut=100), Answer(status=500)])
    def test_what_passes_is_tried_again(self, answer: Answer, server: FaultServer) -> None:
        once = [answer]
        server.fault = lambda request: once.pop() if once and request.method == "GET" else None
        assert same(STATE, load(blank(STATE), URL))
        assert not once


class TestSaving:
    """A save that fails leaves the checkpoint that was there, and nothing half done."""

    def assert_untouched(self, server: FaultServer) -> None:
        server.fault = lambda request: None
        assert same(STATE, load(blank(STATE), URL))
        assert not server.uploads
        # The next save is not disturbed by what was left.
        save(OTHER, URL)
        assert same(OTHER, load(blank(OTHER), URL))

    @pytest.mark.parametrize("status", [403, 500])
    @pytest.mark.parametrize("ends", [".distcp", ".metadata"])
    def test_an_object_that_is_refused(self, status: int, ends: str, server: FaultServer) -> None:
        server.fault = lambda request: (
            Answer(status=status) if request.method == "PUT" and request.key.endswith(ends) else None
        )
        told = failure(lambda: save(OTHER, URL, s3client_config=config()))
        assert f"{ends}: could not write the object: " in told
        assert ("access was denied" if status == 403 else "the server answered 500") in told
        self.assert_untouched(server)

    @pytest.mark.parametrize(
        "refused", [("POST", "uploads"), ("PUT", "partNumber"), ("POST", "uploadId")], ids=["begin", "part", "end"]
    )
    def test_an_upload_in_parts_that_is_refused(self, refused: tuple[str, str], server: FaultServer) -> None:
        method, query = refused
        server.fault = lambda request: (
            Answer(status=403, code="AccessDenied") if request.method == method and query in request.query else None
        )
        told = failure(lambda: save(BIG, URL, s3client_config=config(part_size=5 * MIB)))
        assert "__0_1.distcp: could not write the object: access was denied (403 AccessDenied)" in told
        assert f"{KEY}/__0_1.distcp" not in server.objects
        self.assert_untouched(server)

    @pytest.mark.parametrize("size", [100, 13 * MIB])
    def test_a_tensor_that_fails_while_it_is_written(self, size: int, server: FaultServer) -> None:
        class Planner(torch_dcp.DefaultSavePlanner):
            def resolve_data(self, write_item: Any) -> Any:
                if write_item.index.fqn == "bad":
                    raise RuntimeError("no such tensor")
                return super().resolve_data(write_item)

        state = {"a": torch.zeros(size, dtype=torch.uint8), "bad": torch.zeros(1)}
        writer = S3StorageWriter(REGION, URL, config(part_size=5 * MIB))
        told = failure(lambda: torch_dcp.save(state, storage_writer=writer, planner=Planner(), no_dist=True))
        assert "no such tensor" in told
        assert list(server.objects) == [f"{KEY}/__0_0.distcp", f"{KEY}/.metadata"]
        self.assert_untouched(server)

    def test_old_objects_that_cannot_be_deleted_are_told_and_left(
        self, server: FaultServer, caplog: pytest.LogCaptureFixture
    ) -> None:
        server.fault = lambda request: Answer(status=403) if request.method == "DELETE" else None
        save(OTHER, URL, s3client_config=config())
        assert "a file of the replaced checkpoint could not be deleted" in caplog.text
        assert same(OTHER, load(blank(OTHER), URL))

    def test_metadata_comes_after_the_data_and_deletion_last(self, server: FaultServer) -> None:
        before = len(server.requests)
        save(OTHER, URL)
        changes = [(r.method, r.key) for r in server.requests[before:] if r.method not in ("GET", "HEAD")]
        assert changes == [
            ("PUT", f"{KEY}/__0_1.distcp"),
            ("PUT", f"{KEY}/.metadata"),
            ("DELETE", f"{KEY}/__0_0.distcp"),
        ]


class TestUploads:
    def files(self, **options: Any) -> S3FileSystem:
        return S3FileSystem(REGION, s3client_config=config(part_size=5 * MIB, **options))

    @pytest.mark.parametrize("size", [0, 1, 5 * MIB - 1, 5 * MIB, 5 * MIB + 1, 11 * MIB])
    def test_any_size_in_pieces_of_any_size(self, size: int, server: FaultServer) -> None:
        content = torch.randint(0, 256, (size,), dtype=torch.uint8).numpy().tobytes()
        with self.files().create_stream("s3://bucket/o", "wb") as stream:
            begin = 0
            for length in (1, 3 * MIB, 0, 4 * MIB, 5, size):
                assert stream.tell() == begin
                begin += stream.write(content[begin : begin + length])
        assert server.objects["bucket/o"] == content
        puts = [request for request in server.requests if request.method == "PUT" and request.key == "bucket/o"]
        assert len(puts) == max(1, -(-size // (5 * MIB)))

    @pytest.mark.parametrize("size", [10, 12 * MIB])
    def test_an_exception_publishes_nothing(self, size: int, server: FaultServer) -> None:
        server.objects["bucket/o"] = b"before"
        with pytest.raises(KeyboardInterrupt), self.files().create_stream("s3://bucket/o", "wb") as stream:
            stream.write(bytes(size))
            raise KeyboardInterrupt
        assert server.objects["bucket/o"] == b"before"
        assert not server.uploads

    @pytest.mark.parametrize("size", [10, 12 * MIB])
    def test_a_stream_that_is_forgotten_publishes_nothing(self, size: int, server: FaultServer) -> None:
        stream = self.files().create_stream("s3://bucket/o", "wb")
        stream.__enter__().write(bytes(size))
        del stream
        gc.collect()
        assert "bucket/o" not in server.objects
        assert not server.uploads

    def test_a_stream_that_is_closed_early_is_published_once(self, server: FaultServer) -> None:
        with self.files().create_stream("s3://bucket/o", "wb") as stream:
            stream.write(b"all of it")
            stream.close()
            with pytest.raises(ValueError, match="closed"):
                stream.write(b"more")
        assert server.objects["bucket/o"] == b"all of it"

    def test_a_failure_ends_the_writing(self, server: FaultServer) -> None:
        server.fault = lambda request: Answer(status=403) if "partNumber" in request.query else None

        def write_for_ever() -> None:
            with self.files(throughput_target_gbps=0.1).create_stream("s3://bucket/o", "wb") as stream:
                while True:
                    stream.write(bytes(MIB))

        assert "s3://bucket/o: could not write the object: access was denied" in failure(write_for_ever)
        assert not server.uploads

    def test_memory_is_bounded_while_the_server_is_slow(self, server: FaultServer) -> None:
        go_on, part_bytes, parts_at_once = threading.Event(), 64 << 10, 2

        def fault(request: Request) -> None:
            if "partNumber" in request.query:
                go_on.wait(60)

        server.fault = fault
        url = parse_object_url("s3://bucket/o")
        store = make_client(url, ObjectStoreOptions())
        upload = ObjectUpload(store, url.key, "s3://bucket/o", part_bytes=part_bytes, parts_at_once=parts_at_once)
        content = os.urandom(40 * part_bytes)

        def write() -> None:
            with upload:
                for begin in range(0, len(content), 1000):
                    upload.write(content[begin : begin + 1000])

        writer = threading.Thread(target=write)
        writer.start()
        try:
            while sum("partNumber" in request.query for request in server.requests) < parts_at_once:
                time.sleep(0.01)
            time.sleep(0.3)  # for what would be too much to get in
            # In flight, about to be, waiting, and being filled.
            assert upload.tell() <= (parts_at_once + 4) * part_bytes
        finally:
            go_on.set()
            writer.join()
        assert server.objects["bucket/o"] == content

    def test_more_parts_than_a_server_takes(self, server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("engine_loader.dcp.s3_upload.MAX_PARTS", 2)

        def write() -> None:
            with self.files().create_stream("s3://bucket/o", "wb") as stream:
                stream.write(bytes(16 * MIB))

        assert f"more than 2 parts of {5 * MIB} bytes (raise part_size" in failure(write)
        assert not server.uploads

    def test_parts_are_as_large_as_an_object_needs(self, server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("engine_loader.dcp.s3_file_system._MOST_PLANNED_PARTS", 2)
        state = {"a": torch.zeros(15 * MIB, dtype=torch.uint8)}
        save(state, "s3://bucket/large", s3client_config=config(part_size=5 * MIB))
        parts = [request for request in server.requests if "partNumber" in request.query]
        assert len(parts) == 2


def test_deletion_and_renaming_tell_what_failed(server: FaultServer) -> None:
    files = S3FileSystem(REGION, s3client_config=config())
    server.fault = lambda request: Answer(status=403, code="AccessDenied") if request.method == "DELETE" else None
    assert "could not delete the object: access was denied" in failure(lambda: files.rm_file(f"{URL}/.metadata"))
    assert files.exists(f"{URL}/.metadata")


def test_renaming_tries_the_deletion_again(server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine_loader.dcp.s3_file_system._LONGEST_PAUSE_S", 0.01)
    files = S3FileSystem(REGION, s3client_config=config())
    refusals = [1, 2]
    server.fault = lambda request: (
        Answer(status=403) if request.method == "DELETE" and refusals and refusals.pop() else None
    )
    content = server.objects[f"{KEY}/.metadata"]
    files.rename(f"{URL}/.metadata", f"{URL}/moved to")
    assert server.objects[f"{KEY}/moved to"] == content
    assert f"{KEY}/.metadata" not in server.objects
    refusals = [1, 2, 3]
    assert "could not delete the object" in failure(lambda: files.rename(f"{URL}/moved to", f"{URL}/again"))


def test_whether_an_object_is_there_is_not_guessed(server: FaultServer) -> None:
    server.fault = lambda request: Answer(status=403) if request.method == "HEAD" else None
    files = S3FileSystem(REGION, s3client_config=config())
    assert "could not look for the object: access was denied" in failure(lambda: files.exists(f"{URL}/x"))
    careful = {"overwrite": False, "s3client_config": config()}
    assert "could not look for the object" in failure(lambda: save(OTHER, URL, **careful))
    assert "this is a bucket where an object is meant" in failure(lambda: files.exists("s3://bucket"))
    assert dcp.S3FileSystem.validate_checkpoint_id(URL)
