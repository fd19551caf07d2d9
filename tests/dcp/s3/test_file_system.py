"""S3FileSystem and its configuration: what a request looks like, and where it goes."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from obstore.store import S3Store
from s3torchconnector import S3ClientConfig as TheirConfig
from s3torchconnector import S3Exception, S3ReaderConstructor
from s3torchconnector._s3client import MockS3Client, S3Client
from torch.distributed.checkpoint.filesystem import FileSystemBase

from engine_loader import CheckpointError, SettingsError
from engine_loader.dcp import S3ClientConfig, S3FileSystem
from engine_loader.dcp.s3_config import S3Setup
from tests.support.fault_server import Answer, FaultServer, Request
from tests.support.object_stores import NOWHERE
from tests.support.s3_server import S3Server

from .buckets import REGION, load, save

MIB = 1 << 20


@pytest.fixture
def files(on_s3: S3Server) -> S3FileSystem:
    on_s3.make_bucket("files")
    return S3FileSystem(REGION)


def test_it_is_a_file_system_of_torchs(files: S3FileSystem) -> None:
    assert isinstance(files, FileSystemBase)
    base = files.init_path("s3://files/some dir//")
    assert base == "s3://files/some dir"
    path = files.concat_path(base, "a b")
    assert path == files.concat_path(base + "/", "a b") == "s3://files/some dir/a b"
    files.mkdir(base)
    assert not files.exists(path)
    assert files.ls(base) == []
    with files.create_stream(path, "wb") as stream:
        assert stream.writable()
        stream.write(b"0123456789")
    assert files.exists(path)
    assert files.ls(base) == [path]
    files.rename(path, f"{base}/c+d ü")
    assert files.ls(base) == [f"{base}/c+d ü"]
    with files.create_stream(f"{base}/c+d ü", "rb") as stream:
        assert stream.read() == b"0123456789"
    files.rm_file(f"{base}/c+d ü")
    assert not files.exists(f"{base}/c+d ü")


def test_an_object_is_read_like_a_file(files: S3FileSystem, tmp_path: Path) -> None:
    content = torch.randint(0, 256, (1_000_000,), dtype=torch.uint8).numpy().tobytes()
    with files.create_stream("s3://files/o", "wb") as stream:
        stream.write(memoryview(content))
        stream.write(torch.arange(10).numpy())
    content += torch.arange(10).numpy().tobytes()
    (tmp_path / "o").write_bytes(content)
    with files.create_stream("s3://files/o", "rb") as stream, (tmp_path / "o").open("rb") as file:
        for step in (("seek", 5), ("read", 7), ("tell",), ("seek", -20, os.SEEK_END), ("read",), ("read", 3)):
            assert getattr(stream, step[0])(*step[1:]) == getattr(file, step[0])(*step[1:])
        for offset in (0, 999_990, 17, 500_000, 2_000_000):
            assert stream.seek(offset) == file.seek(offset)
            assert stream.read(100_000) == file.read(100_000)
        assert stream.seekable()
        assert stream.readable()
        with pytest.raises(ValueError, match="no byte -1"):
            stream.seek(-1)


def test_torch_and_pickle_read_and_write_it(files: S3FileSystem) -> None:
    tensor, value = torch.randn(300, 40), {"a": [1, 2, "x" * 100]}
    with files.create_stream("s3://files/t", "wb") as stream:
        torch.save(tensor, stream)
    with files.create_stream("s3://files/p", "wb") as stream:
        pickle.dump(value, stream)
    with files.create_stream("s3://files/t", "rb") as stream:
        assert torch.equal(torch.load(stream), tensor)
    with files.create_stream("s3://files/p", "rb") as stream:
        assert pickle.load(stream) == value


@pytest.mark.parametrize("reading", [None, S3ReaderConstructor.sequential(), S3ReaderConstructor.range_based(0)])
def test_s3torchconnector_s_client_makes_the_requests(reading: Any) -> None:
    client = MockS3Client(REGION, "files")
    files = S3FileSystem(REGION, client, reader_constructor=reading)
    with files.create_stream("s3://files/run/a", "wb") as stream:
        stream.write(b"0123456789")
    files.rename("s3://files/run/a", "s3://files/run/c")
    assert (files.exists("s3://files/run/a"), files.exists("s3://files/run/c")) == (False, True)
    with files.create_stream("s3://files/run/c", "rb") as stream:
        assert (stream.seek(3), stream.read(4)) == (3, b"3456")
    files.rm_file("s3://files/run/c")
    assert not files.exists("s3://files/run/c")
    client.delete_object = lambda *_: (_ for _ in ()).throw(S3Exception("not now"))  # type: ignore[method-assign]
    with pytest.raises(S3Exception, match="not now"):
        files.rm_file("s3://files/run/c")


def test_s3torchconnector_s_client_on_a_server(files: S3FileSystem, on_s3: S3Server) -> None:
    config = TheirConfig(force_path_style=True, part_size=6 * MIB)
    theirs = S3FileSystem("", S3Client(REGION, endpoint=on_s3.url, s3client_config=config))
    assert theirs.setup.part_bytes == 6 * MIB
    with theirs.create_stream("s3://files/theirs", "wb") as stream:
        stream.write(b"theirs")
    theirs.rename("s3://files/theirs", "s3://files/the irs")
    with files.create_stream("s3://files/the irs", "rb") as stream:
        assert stream.read() == b"theirs"
    assert theirs.exists("s3://files/the irs")
    assert not theirs.exists("s3://files/ours")


@pytest.mark.parametrize("mode", ["r", "w", "ab", "r+b", ""])
def test_other_modes_are_refused(files: S3FileSystem, mode: str) -> None:
    with pytest.raises(ValueError, match=r"'rb' \(to read\) or 'wb'"), files.create_stream("s3://files/o", mode):
        pass


def test_between_buckets_nothing_is_renamed(files: S3FileSystem) -> None:
    with pytest.raises(ValueError, match="the buckets differ"):
        files.rename("s3://files/a", "s3://others/a")
    with pytest.raises(CheckpointError, match="there is no such object"):
        files.rename("s3://files/not-there", "s3://files/b")


@pytest.mark.parametrize(
    ("path", "valid"),
    [
        ("s3://bucket/run", True),
        ("s3://bucket", True),
        ("gs://bucket/run", True),
        ("az://container/run", True),
        ("/a/directory", False),
        ("https://host/bucket", False),
        ("s3://", False),
        ("s3://bucket/a/../b", False),
        (Path("/a/directory"), False),
    ],
)
def test_what_is_a_checkpoint_s_id(path: Any, valid: bool) -> None:
    assert S3FileSystem.validate_checkpoint_id(path) == valid


def test_a_path_that_is_no_url_is_told() -> None:
    with pytest.raises(CheckpointError, match="not the URL of an object store"):
        save({}, "/a/directory")
    with pytest.raises(CheckpointError, match=r"pathlib.Path makes one slash of two"):
        S3FileSystem(REGION).init_path(Path("s3://bucket/run"))


def test_a_client_of_the_user_s(on_s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    on_s3.make_bucket("files")
    monkeypatch.setenv("AWS_ENDPOINT_URL", NOWHERE)
    store = S3Store("files", endpoint=on_s3.url, client_options={"allow_http": True})
    files = pickle.loads(pickle.dumps(S3FileSystem(REGION, s3_client=store)))
    with files.create_stream("s3://files/mine", "wb") as stream:
        stream.write(b"x")
    assert files.exists("s3://files/mine")


STATE = {"a": torch.arange(3 * MIB).to(torch.float32)}


def credential(request: Request) -> str:
    """KEY/DATE/REGION/…, from the header or the URL that a request is signed by."""
    header = request.headers.get("authorization")
    return request.query["X-Amz-Credential"][0] if header is None else header.partition("Credential=")[2]


class TestConfig:
    def round_trip(self, server: FaultServer, region: str = REGION, **options: Any) -> None:
        config = S3ClientConfig(endpoint_url=server.url, **options)
        save(STATE, "s3://bucket/c", s3client_config=config)
        loaded = load({"a": torch.zeros(3 * MIB)}, "s3://bucket/c", s3client_config=config)
        assert torch.equal(loaded["a"], STATE["a"])

    def test_the_endpoint(self, server: FaultServer) -> None:
        self.round_trip(server)  # the environment's answers nothing
        assert all(credential(request).startswith("test/") for request in server.requests)

    def test_parts_and_ranges(self, server: FaultServer) -> None:
        self.round_trip(server, part_size=6 * MIB)
        assert sum("partNumber" in request.query for request in server.requests) == 3
        spans = [request.headers["range"].removeprefix("bytes=").split("-") for request in server.gets()]
        sizes = [int(last) - int(first) + 1 for first, last in spans]
        assert max(sizes) == 6 * MIB

    def test_unsigned(self, server: FaultServer) -> None:
        self.round_trip(server, unsigned=True)
        assert not any(
            {"authorization", "X-Amz-Signature"} & {*request.headers, *request.query} for request in server.requests
        )

    def test_a_profile_goes_before_the_environment(
        self, server: FaultServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "credentials"
        path.write_text("[work]\naws_access_key_id = WORK\naws_secret_access_key = x\n")
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(path))
        monkeypatch.setenv("AWS_SESSION_TOKEN", "of the other keys")
        self.round_trip(server, profile="work")
        for request in server.requests:
            assert credential(request).startswith("WORK/")
            assert credential(request).split("/")[2] == REGION
            assert not {"x-amz-security-token", "X-Amz-Security-Token"} & {*request.headers, *request.query}
        with pytest.raises(CheckpointError, match="the AWS profile 'none' has no keys"):
            S3FileSystem(REGION, s3client_config=S3ClientConfig(profile="none")).exists("s3://bucket/c")

    @pytest.mark.parametrize("attempts", [1, 3])
    def test_attempts(self, server: FaultServer, attempts: int) -> None:
        server.fault = lambda request: Answer(status=503, code="SlowDown")
        files = S3FileSystem(REGION, s3client_config=S3ClientConfig(max_attempts=attempts, endpoint_url=server.url))
        with pytest.raises(CheckpointError, match="the server answered 503"):
            files.exists("s3://bucket/c")
        assert len(server.requests) == attempts

    def test_the_region(self, server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        for region, signed in (("eu-west-1", "eu-west-1"), ("", "us-east-1")):
            S3FileSystem(region).exists("s3://bucket/c")
            assert f"/{signed}/s3/" in server.requests[-1].headers["authorization"]

    def test_path_style_goes_before_the_settings(self, server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ENGINE_LOADER_LOADER__OBJECT_STORE_VIRTUAL_HOST", "true")
        self.round_trip(server, force_path_style=True)
        assert {request.key for request in server.requests if request.method == "PUT"} >= {"bucket/c/.metadata"}

    @pytest.mark.parametrize(("gbps", "requests"), [(0.1, 1), (10, 16), (25, 40), (1000, 256)])
    def test_the_target_decides_how_many_requests_are_in_flight(self, gbps: float, requests: int) -> None:
        setup = S3Setup.of(REGION, S3ClientConfig(throughput_target_gbps=gbps), {})
        assert setup.settings.object_store_requests == requests

    def test_without_a_config_the_settings_hold(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ENGINE_LOADER_LOADER__OBJECT_STORE_REQUESTS", "7")
        monkeypatch.setenv("ENGINE_LOADER_LOADER__OBJECT_STORE_RANGE_BYTES", "1MiB")
        setup = S3Setup.of(REGION, None, {"max_tries": 3})
        assert (setup.settings.object_store_requests, setup.settings.max_tries) == (7, 3)
        assert setup.settings.object_store_range_bytes == MIB
        assert setup.part_bytes == 5 * MIB
        with pytest.raises(SettingsError, match="object_store_request"):
            S3FileSystem(REGION, object_store_request=3)

    @pytest.mark.parametrize(
        ("options", "part_bytes", "tries"),
        [
            ({"part_size": 8000}, 5 * MIB, 10),
            ({"part_size": 6 << 30}, 5 << 30, 10),
            ({"max_attempts": 0}, 8 * MIB, 1),
            ({"max_attempts": 1000}, 8 * MIB, 100),
        ],
    )
    @pytest.mark.parametrize("kind", [S3ClientConfig, TheirConfig])
    def test_values_out_of_range_become_the_nearest_within(
        self, kind: Any, options: dict[str, Any], part_bytes: int, tries: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level("DEBUG", "engine_loader.dcp.s3_config")
        setup = S3Setup.of(REGION, kind(**options), {})
        assert (setup.part_bytes, setup.settings.max_tries) == (part_bytes, tries)
        ((name, value),) = options.items()
        assert f"{name} is {value}; S3 and this package take" in caplog.text

    def test_a_throughput_of_nothing_is_refused_where_a_client_is_made(self) -> None:
        with pytest.raises(ValueError, match="throughput_target_gbps is 0; it must be positive"):
            S3FileSystem(REGION, s3client_config=S3ClientConfig(throughput_target_gbps=0))

    def test_s3torchconnector_s_config_is_taken(self) -> None:
        config = TheirConfig(20.0, 16 * MIB, unsigned=True, max_attempts=3, profile="someone")
        setup = S3Setup.of(REGION, config, {})
        assert (setup.settings.object_store_requests, setup.part_bytes, setup.client.max_tries) == (32, 16 * MIB, 3)
        assert (setup.client.anonymous, setup.client.profile) == (True, "someone")
        with pytest.raises(TypeError, match="s3client_config is dict, neither"):
            S3FileSystem(REGION, s3client_config={"part_size": 1})  # type: ignore[arg-type]

    def test_its_defaults_are_those_of_s3torchconnector(self) -> None:
        assert {**vars(TheirConfig()), "endpoint_url": None} == vars(S3ClientConfig())

    def test_google(self, server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> None:
        account = {"disable_oauth": True, "client_email": "", "private_key": "", "private_key_id": ""}
        monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT_KEY", json.dumps(account))
        config = S3ClientConfig(endpoint_url=server.url)
        save(STATE, "gs://bucket/c", s3client_config=config)
        loaded = load({"a": torch.zeros(3 * MIB)}, "gs://bucket/c", s3client_config=config)
        assert torch.equal(loaded["a"], STATE["a"])
