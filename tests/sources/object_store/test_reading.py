"""Checkpoints in object stores, of every layout, read bit for bit: from S3, and from a server that counts."""

import multiprocessing
import os
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine_loader import CheckpointError, open_checkpoint
from engine_loader.settings import LoaderSettings
from engine_loader.sources.object_store.client import ObjectStoreOptions
from engine_loader.sources.object_store.object_source import ObjectStoreSource
from engine_loader.sources.object_store.url import ObjectUrl, parse_object_url
from engine_loader.sources.registry import is_remote, make_source
from tests.cli.running import invoke
from tests.support.checkpoints import Entry, checkpoint, entry, index, noise, tensor_bytes
from tests.support.fault_server import Answer, FaultServer, Request
from tests.support.s3_server import S3Server

KIB = 1 << 10
INDEX = "model.safetensors.index.json"
ONE: dict[str, Entry] = {"embed": entry("BF16", [64, 16], 1), "norm": entry("F32", [16], 2)}
TWO: dict[str, Entry] = {
    "big": entry("F32", [400, 500], 3),
    "scale": entry("F8_E4M3", [], 4),
    "none": entry("F32", [0]),
}
BOTH = {**ONE, **TWO}
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
MAP = dict.fromkeys(ONE, FIRST) | dict.fromkeys(TWO, SECOND)


@pytest.fixture(scope="module")
def bucket(s3: S3Server) -> str:
    one, two = checkpoint(ONE, {"format": "pt"}), checkpoint(TWO)
    shards = {FIRST: one, SECOND: two}
    indexed = {**shards, INDEX: index(MAP), "config.json": b"{}"}
    layouts = {
        "single": {"model.safetensors": checkpoint(BOTH)},
        "indexed": indexed,
        "no-index": shards,
        "marked": {"": b"", "below/": b"", **indexed},
        "sharded": {"model-rank-0-part-0.safetensors": one, "model-rank-1-part-0.safetensors": two},
        "natural": {f"part-{number}.safetensors": checkpoint({f"t{number}": ONE["norm"]}) for number in (10, 9, 2)},
        "incomplete": {FIRST: one, INDEX: index(MAP)},
        "escaping": {INDEX: index({"norm": "../single/model.safetensors"})},
        "odd": {"model.safetensors": one, "/below": b""},
        "pickled": {"pytorch_model.bin": b"x"},
        "deep/er/and a key+with %20 ü#?&": indexed,
    }
    objects = {f"{layout}/{name}": content for layout, files in layouts.items() for name, content in files.items()}
    s3.put("models", objects)
    s3.put("flat", indexed)
    return "s3://models"


def content_of(path: Any, **options: Any) -> dict[str, bytes]:
    with open_checkpoint(path, **options) as opened:
        return {name: tensor_bytes(tensor) for name, tensor in opened.tensors()}


def bytes_of(tensors: dict[str, Entry]) -> dict[str, bytes]:
    return {name: content for name, (_, _, content) in tensors.items()}


@pytest.mark.usefixtures("on_s3")
class TestLayouts:
    @pytest.mark.parametrize("backend", ["auto", "object_store"])
    @pytest.mark.parametrize(
        "path",
        [
            "models/single",
            "models/single/model.safetensors",
            "models/indexed",
            "models/indexed//",
            "models/no-index",
            "models/marked/",
            "models/deep/er/and a key+with %20 ü#?&",
            "flat",
            "flat/",
        ],
    )
    def test_every_layout_is_read_bit_for_bit(self, path: str, backend: str, bucket: str) -> None:
        assert content_of(f"s3://{path}", backend=backend) == bytes_of(BOTH)

    def test_an_object_says_that_it_is_remote_and_cannot_be_mapped(self, bucket: str) -> None:
        file = make_source("auto").open(f"{bucket}/single/model.safetensors")
        assert (file.remote, file.mappable, file.native_access, file.fileno()) == (True, False, None, None)
        file.close()

    def test_a_list_of_objects(self, bucket: str) -> None:
        assert content_of([f"{bucket}/indexed/{SECOND}"]) == bytes_of(TWO)

    def test_an_object_and_a_file_together(self, bucket: str, tmp_path: Path) -> None:
        (tmp_path / "one.safetensors").write_bytes(checkpoint(ONE))
        assert content_of([str(tmp_path / "one.safetensors"), f"{bucket}/indexed/{SECOND}"]) == bytes_of(BOTH)

    def test_files_come_in_natural_order(self, bucket: str) -> None:
        assert list(content_of(f"{bucket}/natural")) == ["t2", "t9", "t10"]

    @pytest.mark.parametrize(("rank", "tensors"), [(0, ONE), (1, TWO)])
    def test_a_rank_of_a_sharded_state(self, rank: int, tensors: dict[str, Entry], bucket: str) -> None:
        assert content_of(f"{bucket}/sharded", rank=rank) == bytes_of(tensors)

    def test_slices_and_reading_into_memory(self, bucket: str) -> None:
        expected = torch.frombuffer(bytearray(TWO["big"][2]), dtype=torch.float32).view(400, 500)
        with open_checkpoint(f"{bucket}/indexed") as opened:
            part = opened.get_slice("big")[10:300:7, 17:450]
            assert tensor_bytes(part) == tensor_bytes(expected[10:300:7, 17:450])
            target = torch.zeros(500, 400).t()
            opened.load_into({"big": target})
            assert tensor_bytes(target) == tensor_bytes(expected)

    @pytest.mark.parametrize(
        ("path", "message"),
        [
            ("models/incomplete", f"the index puts 3 tensors into '{SECOND}', which is not there"),
            ("models/escaping", "which is not a file of its directory"),
            ("models/pickled", "no .safetensors file in this directory (it has PyTorch files"),
            ("models/sharded", "this is a sharded_state checkpoint of 2 ranks"),
            ("models/odd", "keys with empty parts cannot be read"),
            ("models/nothing", "there is no such object"),
            ("models/nothing.safetensors", "there is no such object"),
            ("models/single/config.json", "there is no such object"),
            ("no-such-bucket/model", "there is no such bucket"),
            ("models", "no .safetensors file in this directory"),
        ],
    )
    def test_what_is_no_checkpoint_says_why(self, path: str, message: str, bucket: str) -> None:
        with pytest.raises(CheckpointError) as raised:
            open_checkpoint(f"s3://{path}")
        assert message in str(raised.value)
        assert str(raised.value).startswith(f"s3://{path}")

    def test_inspect(self, bucket: str) -> None:
        shown = invoke("inspect", f"{bucket}/indexed", "--check")
        assert shown.exit_code == 0, shown.output
        assert f"{bucket}/indexed/{FIRST}" in shown.output
        assert "sound: the headers of 2 files, and the index fits them" in shown.output
        missing = invoke("inspect", f"{bucket}/incomplete", "--check")
        assert missing.exit_code == 1
        assert SECOND in missing.output


class TestRequests:
    @pytest.fixture(autouse=True)
    def _objects(self, on_server: FaultServer) -> None:
        on_server.objects["bucket/big.safetensors"] = checkpoint({"big": TWO["big"]})

    def test_large_tensors_are_read_in_ranges_and_no_byte_twice(self, server: FaultServer) -> None:
        loaded = content_of("s3://bucket/big.safetensors", object_store_range_bytes="64KiB")
        assert loaded == {"big": TWO["big"][2]}
        spans = [
            tuple(map(int, request.headers["range"].removeprefix("bytes=").split("-"))) for request in server.gets()
        ]
        assert all(last - first < 64 * KIB for first, last in spans)
        header = len(server.objects["bucket/big.safetensors"]) - len(TWO["big"][2])
        data = sorted(span for span in spans if span[0] >= header)
        assert sum(last - first + 1 for first, last in data if first % (64 * KIB) == header) == len(TWO["big"][2])

    def test_ranges_are_asked_for_several_at_once(self, server: FaultServer) -> None:
        together = threading.Barrier(4, timeout=30)
        waited = []

        def fault(request: Request) -> Answer | None:
            if request.method == "GET" and 2 <= request.number < 6:
                waited.append(together.wait())
            return None

        server.fault = fault
        loaded = content_of("s3://bucket/big.safetensors", object_store_range_bytes="64KiB", object_store_requests=4)
        assert loaded == {"big": TWO["big"][2]}
        assert sorted(waited) == [0, 1, 2, 3]

    def test_rows_that_lie_close_come_by_one_request(self, server: FaultServer) -> None:
        server.objects["bucket/rows.safetensors"] = checkpoint({"rows": entry("F32", [20, 50_000], 5)})
        with open_checkpoint("s3://bucket/rows.safetensors") as opened:
            before = len(server.gets())
            columns = opened.get_slice("rows")[:, 100:110]
            assert len(server.gets()) == before + 1
            assert tensor_bytes(columns) == tensor_bytes(opened.get_tensor("rows")[:, 100:110])

    def test_the_native_engine_says_that_it_cannot(self) -> None:
        with (
            open_checkpoint("s3://bucket/big.safetensors", engine="cpp") as opened,
            pytest.raises(CheckpointError, match="set engine to auto"),
        ):
            opened.get_tensor("big")

    def test_a_prefix_is_listed_once(self, server: FaultServer) -> None:
        server.objects |= {f"bucket/m/{FIRST}": checkpoint(ONE), f"bucket/m/{SECOND}": checkpoint(TWO)}
        server.objects[f"bucket/m/{INDEX}"] = index(MAP)
        assert content_of("s3://bucket/m") == bytes_of(BOTH)
        assert len([request for request in server.requests if "list-type" in request.query]) == 1

    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_any_range_into_any_buffers(self, data: st.DataObject, server: FaultServer) -> None:
        content = noise(1000)
        server.objects["bucket/any"] = content
        source = ObjectStoreSource(ObjectStoreOptions(range_bytes=data.draw(st.integers(1, 1200))))
        offset = data.draw(st.integers(0, 1100))
        sizes = data.draw(st.lists(st.integers(0, 400), max_size=6))
        buffers = [memoryview(bytearray(size)) for size in sizes]
        got = source.open("s3://bucket/any").read_into(offset, buffers)
        wanted = min(sum(sizes), source.options.range_bytes, max(0, len(content) - offset))
        assert got == wanted
        assert b"".join(buffers)[:got] == content[offset : offset + got]
        assert not any(b"".join(buffers)[got:])


class TestAddresses:
    """Where requests go, and how they are signed."""

    @pytest.fixture(autouse=True)
    def _object(self, server: FaultServer) -> None:
        for key in ("bucket/model.safetensors", "model.safetensors"):
            server.objects[key] = checkpoint(ONE)

    @pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
    def test_the_endpoint_of_the_environment(
        self, variable: str, server: FaultServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(variable, server.url)
        assert content_of("s3://bucket/model.safetensors") == bytes_of(ONE)

    @pytest.mark.parametrize("scheme", ["s3", "gs"])
    def test_the_endpoint_of_the_settings_goes_first(
        self, scheme: str, server: FaultServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
        options = {"object_store_endpoint_url": f"{server.url}/", "object_store_anonymous": True}
        assert content_of(f"{scheme}://bucket/model.safetensors", **options) == bytes_of(ONE)
        assert not any("authorization" in request.headers for request in server.requests)

    def test_azure(self, server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> None:
        options = {"object_store_endpoint_url": server.url, "object_store_anonymous": True}
        with pytest.raises(CheckpointError, match="AZURE_STORAGE_ACCOUNT_NAME must be set"):
            open_checkpoint("az://bucket/model.safetensors", **options)
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
        assert content_of("az://bucket/model.safetensors", **options) == bytes_of(ONE)

    def test_the_bucket_in_the_hosts_name(self, server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> None:
        # A proxy is told the whole URL, and no name need be resolved.
        monkeypatch.setenv("http_proxy", server.url)
        endpoint = {"object_store_endpoint_url": "http://store.test", "object_store_virtual_host": True}
        assert content_of("s3://bucket/model.safetensors", **endpoint) == bytes_of(ONE)
        assert {request.headers["host"] for request in server.requests} == {"bucket.store.test"}
        assert {request.key for request in server.requests} == {"model.safetensors"}

    @pytest.mark.usefixtures("on_server")
    @pytest.mark.parametrize(
        ("options", "region"), [({}, "us-east-1"), ({"object_store_region": "eu-central-1"}, "eu-central-1")]
    )
    def test_requests_are_signed_for_the_region(self, options: Any, region: str, server: FaultServer) -> None:
        assert content_of("s3://bucket/model.safetensors", **options) == bytes_of(ONE)
        assert all(
            f"Credential=test/{request.headers['x-amz-date'][:8]}/{region}/s3" in request.headers["authorization"]
            for request in server.requests
        )


class TestProfiles:
    """The files of AWS's tools."""

    @pytest.fixture(autouse=True)
    def _profiles(self, on_server: FaultServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        on_server.objects["bucket/model.safetensors"] = checkpoint(ONE)
        (tmp_path / "credentials").write_text(
            "[default]\naws_access_key_id = DEFAULT\naws_secret_access_key = x%y\n"
            "[work]\naws_access_key_id = WORK\naws_secret_access_key = x\naws_session_token = TOKEN\n"
        )
        (tmp_path / "config").write_text("[profile work]\nregion = eu-west-3\n[profile sso]\nsso_session = x\n")
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
            monkeypatch.delenv(name)

    def signed_by(self, server: FaultServer) -> str:
        assert content_of("s3://bucket/model.safetensors") == bytes_of(ONE)
        return server.requests[0].headers["authorization"]

    def test_the_default_profile(self, server: FaultServer) -> None:
        assert "Credential=DEFAULT/" in self.signed_by(server)

    def test_a_named_profile_with_its_region(self, server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_PROFILE", "work")
        authorization = self.signed_by(server)
        assert "Credential=WORK/" in authorization
        assert "/eu-west-3/s3/" in authorization
        assert server.requests[0].headers["x-amz-security-token"] == "TOKEN"

    def test_the_environments_keys_go_first(self, server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "ENVIRONMENT")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
        assert "Credential=ENVIRONMENT/" in self.signed_by(server)

    @pytest.mark.parametrize("profile", ["sso", "no-such-profile"])
    def test_a_profile_without_keys_says_how_to_get_them(self, profile: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_PROFILE", profile)
        with pytest.raises(CheckpointError, match=f"'{profile}' has no keys in .*aws configure export-credentials"):
            open_checkpoint("s3://bucket/model.safetensors")

    def test_a_broken_file_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "credentials").write_text("aws_access_key_id = 1\n")
        with pytest.raises(CheckpointError, match="credentials: could not read the AWS profiles"):
            open_checkpoint("s3://bucket/model.safetensors")


@pytest.mark.parametrize(
    ("path", "url"),
    [
        ("s3://bucket/a/b", ObjectUrl("s3", "bucket", "a/b")),
        ("gs://bucket", ObjectUrl("gs", "bucket", "")),
        ("az://container/a//", ObjectUrl("az", "container", "a")),
        ("s3://b.c-d_e/%20 ?x=1#y", ObjectUrl("s3", "b.c-d_e", "%20 ?x=1#y")),
    ],
)
def test_urls_are_taken_apart(path: str, url: ObjectUrl) -> None:
    assert is_remote(path)
    assert parse_object_url(path) == url


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/models/a", "not the URL of an object store"),
        ("s3://", "names no bucket"),
        ("s3:///key", "names no bucket"),
        ("s3://user@bucket/key", "names no bucket"),
        ("s3://bucket/a/../b", "a key with an empty part"),
        ("s3://bucket/a//b", "a key with an empty part"),
        ("s3://bucket//b", "a key with an empty part"),
        ("http://host/key", "not the URL of an object store"),
    ],
)
def test_what_is_no_url_is_refused(path: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        make_source("object_store").open(path)


def test_a_path_object_is_not_a_url() -> None:
    with pytest.raises(CheckpointError, match=r"pathlib\.Path makes one slash of two"):
        open_checkpoint(Path("s3://bucket/key"))


def test_without_obstore_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(CheckpointError, match=r"pip install 'engine-loader\[s3\]'"):
        open_checkpoint("s3://bucket/key")


def test_files_are_read_without_obstore(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    (tmp_path / "model.safetensors").write_bytes(checkpoint(ONE))
    assert content_of(tmp_path) == bytes_of(ONE)


def test_settings_reach_the_source() -> None:
    options = ObjectStoreOptions.from_settings(
        LoaderSettings(object_store_timeout_s=7, max_tries=3, object_store_region="x")
    )
    assert (options.timeout_s, options.max_tries, options.region) == (7, 3, "x")


def _read_in_child(url: str, answer: Any) -> None:
    try:
        open_checkpoint(url).close()
        answer.send("read")
    except BaseException as error:
        answer.send(str(error))


@pytest.mark.usefixtures("on_s3")
def test_a_forked_child_is_told_that_it_cannot_read(bucket: str) -> None:
    content_of(f"{bucket}/single")
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=_read_in_child, args=(f"{bucket}/single", theirs))
    child.start()
    assert ours.poll(60)
    assert "in a process that was forked from one that has used them" in ours.recv()
    child.join()
    assert os.getpid() != child.pid
