"""Hosts: those that are configured, those of AWS by region and bucket, and certificates and proxies before them."""

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import cast

import botocore.config
import botocore.session
import obstore
import pytest
from obstore.store import S3Store

from engine_loader import CheckpointError, open_checkpoint
from engine_loader.compile_cache.stores.objects import ObjectCacheStore
from engine_loader.compile_cache.trust import Trust
from engine_loader.dcp import S3ClientConfig, S3FileSystem, S3StorageReader
from engine_loader.sources.object_store.client import ObjectStoreOptions, ObjectStores, make_client
from engine_loader.sources.object_store.endpoints import sts_endpoint
from engine_loader.sources.object_store.object_source import ObjectStoreSource
from engine_loader.sources.object_store.url import parse_object_url
from tests.sources.object_store.model import CONTENT, KEY, QUICK, RIGHT, URL, load
from tests.support.certificates import Authority
from tests.support.checkpoints import checkpoint, entry
from tests.support.fault_server import Answer, FaultServer, Request

REGIONS = ["us-east-1", "eu-central-1", "cn-north-1", "cn-northwest-1", "us-gov-west-1", "us-iso-east-1"]
REGIONS += ["us-isob-east-1", "us-isof-south-1", "eu-isoe-west-1", "eusc-de-east-1"]
FIPS, DUAL_STACK = "AWS_USE_FIPS_ENDPOINT", "AWS_USE_DUALSTACK_ENDPOINT"
LARGE = checkpoint({"t": entry("F32", [1 << 20], seed=1)})
"""Its data comes by ranges that this package receives itself."""


def failure(url: str = URL, **options: object) -> str:
    with pytest.raises(CheckpointError) as raised:
        open_checkpoint(url, **{**QUICK, **options})
    return str(raised.value)


class TestAnEndpointThatIsNoAddress:
    BAD = ("localhost:9000", "127.0.0.1:9000/minio", "https://", "http:///x", "ftp://x", "http://[bad", "http://a b")
    BAD += ("http://host:99999", "http://host:x", "http://host/?a=1")

    @pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"])
    @pytest.mark.parametrize("address", BAD)
    def test_is_named_by_its_variable(self, address: str, variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("AWS_ENDPOINT_URL")
        monkeypatch.setenv(variable, address)
        told = failure()
        assert f"{variable} is '{address}': " in told
        assert "write http:// or https:// before the server's name" in told

    def test_says_what_to_write(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost:9000")
        assert "as https://localhost:9000" in failure()

    def test_does_not_show_a_password(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", "user:geheim@localhost:9000")
        message = failure()
        assert "AWS_ENDPOINT_URL is 'localhost:9000'" in message
        assert "geheim" not in message

    def test_of_a_training_checkpoint(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost:9000")
        with pytest.raises(CheckpointError, match="AWS_ENDPOINT_URL is 'localhost:9000'"):
            S3StorageReader("us-east-1", "s3://bucket/run").read_metadata()

    def test_an_empty_variable_is_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", "")
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "")
        assert host_of("bucket", "eu-central-1") == "https://s3.eu-central-1.amazonaws.com/bucket/key"


class TestAPanicOfTheClient:
    """It is no Exception in Python, and must not reach those who catch Exceptions."""

    class PanicException(BaseException):
        """What pyo3 raises has this name, and cannot be imported."""

    def panics(self, *_: object, **__: object) -> None:
        raise self.PanicException("called `Option::unwrap()` on a `None` value")

    @pytest.mark.parametrize("call", ["head", "get", "list_with_delimiter"])
    def test_is_a_checkpoint_error(self, call: str, on_server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> None:
        on_server.objects[KEY] = CONTENT
        monkeypatch.setattr(obstore, call, self.panics)
        source = ObjectStoreSource(ObjectStoreOptions())
        with pytest.raises(CheckpointError, match="the client failed"):
            if call == "list_with_delimiter":
                source.list("s3://bucket/prefix")
            else:
                source.open(URL).read_into(0, [memoryview(bytearray(8))])

    @pytest.mark.parametrize("call", ["head", "put", "delete", "copy"])
    def test_of_a_training_checkpoints_file_system(self, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(obstore, call, self.panics)
        files, path = S3FileSystem("us-east-1"), "s3://bucket/run/part"
        with pytest.raises(CheckpointError, match=f"{path}: could not .*the client failed"):
            if call == "put":
                with files.create_stream(path, "wb") as stream:
                    stream.write(b"x")
            else:
                {"head": files.exists, "delete": files.rm_file, "copy": lambda _: files.rename(path, path + "2")}[call](
                    path
                )

    @pytest.mark.parametrize("call", ["head", "list"])
    def test_of_the_compile_caches_store(self, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(obstore, call, self.panics)
        store = ObjectCacheStore("s3://bucket/caches", Trust(anyone=True))
        with pytest.raises(OSError, match="the client failed"):
            if call == "list":
                store.list()
            else:
                with store.open("scope/name/pack"):
                    pass

    def test_of_the_real_client_too(self) -> None:
        # An address that is not checked here, because the client was made by the user.
        client = S3Store("bucket", aws_endpoint_url_s3="localhost:9000", access_key_id="a", secret_access_key="b")
        source = ObjectStoreSource(stores=ObjectStores(ObjectStoreOptions(), client=client))
        with pytest.raises(CheckpointError, match="could not open the object: the client failed"):
            source.open(URL)


def host_of(bucket: str, region: str) -> str:
    """The address to which a request for ``key`` goes."""
    client = make_client(parse_object_url(f"s3://{bucket}/key"), ObjectStoreOptions(region=region))
    return obstore.sign(cast("S3Store", client), "GET", "key", timedelta(hours=1)).partition("?")[0]


class TestHostsOfAws:
    @pytest.fixture(autouse=True)
    def _no_endpoint(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("AWS_ENDPOINT_URL")

    @pytest.mark.parametrize(
        ("region", "options"),
        [
            *((region, ()) for region in REGIONS),
            *((region, (FIPS,)) for region in ("us-east-1", "ca-central-1", "us-gov-west-1", "us-iso-east-1")),
            *((region, (DUAL_STACK,)) for region in ("us-east-1", "eu-central-1", "us-gov-west-1", "cn-north-1")),
            *((region, (FIPS, DUAL_STACK)) for region in ("us-east-1", "us-gov-west-1")),
        ],
    )
    def test_are_those_of_awss_own_client(
        self, region: str, options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in options:
            monkeypatch.setenv(name, "true")
        path_style = {"us_east_1_regional_endpoint": "regional", "addressing_style": "path"}
        config = botocore.config.Config(s3=path_style, signature_version="s3v4")
        client = botocore.session.get_session().create_client("s3", region_name=region, config=config)
        right = client.generate_presigned_url("get_object", Params={"Bucket": "bucket", "Key": "key"})
        assert host_of("bucket", region) == right.partition("?")[0]

    @pytest.mark.parametrize("region", REGIONS)
    def test_of_sts(self, region: str) -> None:
        client = botocore.session.get_session().create_client("sts", region_name=region)
        assert sts_endpoint(region) == client.meta.endpoint_url

    def test_the_alias_of_an_access_point_is_a_virtual_host(self) -> None:
        alias = "mine-x7ewf3kzk1u4ea83kyk9eus1a-s3alias"
        assert host_of(alias, "eu-west-1") == f"https://{alias}.s3.eu-west-1.amazonaws.com/key"

    def test_a_directory_bucket_has_its_zones_host(self, server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HTTPS_PROXY", server.url)
        failure("s3://fast--use1-az4--x-s3/model.safetensors", object_store_region="us-east-1")
        asked = {request.key for request in server.requests if request.method == "CONNECT"}
        assert asked == {"fast--use1-az4--x-s3.s3express-use1-az4.us-east-1.amazonaws.com:443"}

    @pytest.mark.parametrize("option", [FIPS, DUAL_STACK])
    def test_a_directory_bucket_by_fips_is_not_served(self, option: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(option, "true")
        assert "FIPS and dual-stack endpoints of S3 Express are not served" in failure("s3://fast--use1-az4--x-s3/a")


@pytest.mark.parametrize(
    "arn",
    [
        "arn:aws:s3:us-west-2:123456789012:accesspoint/mine",
        "arn:aws:s3::123456789012:accesspoint/mfzwi23gnjvgw.mrap",
        "arn:aws:s3-object-lambda:us-west-2:123456789012:accesspoint/mine",
    ],
)
def test_an_arn_says_to_give_the_alias(arn: str) -> None:
    assert "ARNs are not read (give the access point's alias as the bucket" in failure(f"s3://{arn}/model.safetensors")


class TestAPrivateCertificate:
    @pytest.fixture
    def authority(self, tmp_path: Path) -> Authority:
        return Authority(tmp_path)

    @pytest.fixture(autouse=True)
    def secure(self, authority: Authority, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultServer]:
        monkeypatch.delenv("SSL_CERT_FILE", raising=False)
        with FaultServer(authority.context) as server:
            server.objects[KEY] = CONTENT
            server.objects["bucket/large.safetensors"] = LARGE
            monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
            yield server

    def test_that_is_not_trusted_is_said(self) -> None:
        message = failure()
        assert "the server cannot be reached: its certificate is not trusted" in message
        assert "name the file of its certificate (PEM) in AWS_CA_BUNDLE or SSL_CERT_FILE" in message

    @pytest.mark.parametrize("variable", ["AWS_CA_BUNDLE", "SSL_CERT_FILE"])
    def test_is_trusted_where_it_is_named(
        self, variable: str, authority: Authority, secure: FaultServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(variable, str(authority.bundle))
        assert load() == RIGHT
        with open_checkpoint("s3://bucket/large.safetensors") as opened:
            assert opened.get_tensor("t").numel() == 1 << 20
        # Large ranges are received by this package's own connections, which are told the certificates, too.
        direct = [request for request in secure.gets() if "x-amz-signature" in map(str.lower, request.query)]
        assert direct

    def test_names_of_authorities_between_certificates_do_not_matter(
        self, authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bundle = tmp_path / "bundle.pem"
        bundle.write_bytes("# Főtanúsítvány\n".encode() + authority.bundle.read_bytes())
        monkeypatch.setenv("AWS_CA_BUNDLE", str(bundle))
        assert load() == RIGHT

    @pytest.mark.parametrize("content", [None, "", "rubbish", "-----BEGIN CERTIFICATE-----\n!\n"])
    def test_a_bundle_that_cannot_be_read(
        self, content: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bundle = tmp_path / "bundle.pem"
        if content is not None:
            bundle.write_text(content)
        monkeypatch.setenv("AWS_CA_BUNDLE", str(bundle))
        assert f"{bundle}: the certificates of AWS_CA_BUNDLE cannot be read" in failure()

    def test_of_a_training_checkpoint(self, secure: FaultServer) -> None:
        config = S3ClientConfig(endpoint_url=secure.url, max_attempts=1)
        with pytest.raises(CheckpointError, match="its certificate is not trusted"):
            S3StorageReader("us-east-1", "s3://bucket/run", config).read_metadata()


class TestProxies:
    @pytest.fixture(autouse=True)
    def _objects(self, server: FaultServer) -> None:
        server.objects[KEY] = CONTENT
        server.objects["bucket/large.safetensors"] = LARGE

    @pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
    def test_are_asked(self, variable: str, server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(variable, server.url)
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://store.test")
        assert load() == RIGHT
        assert {request.headers["host"] for request in server.requests} == {"store.test"}

    @pytest.mark.parametrize("excluded", ["127.0.0.1", "127.0.0.0/8", "other.test, 127.0.0.1"])
    def test_are_not_asked_for_hosts_that_are_excluded(
        self, excluded: str, server: FaultServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
        monkeypatch.setenv("NO_PROXY", excluded)
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        assert load() == RIGHT

    def test_that_refuses(self, server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HTTPS_PROXY", server.url)
        monkeypatch.setenv("AWS_ENDPOINT_URL", "https://store.test")
        assert "the server cannot be reached" in failure()
        assert {request.key for request in server.requests} == {"store.test:443"}


class TestARedirect:
    @pytest.fixture(autouse=True)
    def _elsewhere(self, on_server: FaultServer) -> Iterator[None]:
        on_server.objects[KEY] = CONTENT
        with FaultServer() as other:
            other.fault = lambda request: Answer(status=403, code="AccessDenied")
            self.there = other.url.replace("127.0.0.1", "localhost")
            yield

    def redirect(self, request: Request, status: int = 307) -> Answer:
        headers = {"Location": f"{self.there}/{request.key}", "x-amz-bucket-region": "eu-west-1"}
        return Answer(status=status, code="TemporaryRedirect", headers=headers)

    @pytest.mark.parametrize("status", [301, 307, 308])
    @pytest.mark.parametrize("what", [URL, "s3://bucket/prefix"])
    def test_to_another_host_is_named(self, what: str, status: int, on_server: FaultServer) -> None:
        on_server.fault = lambda request: self.redirect(request, status)
        message = failure(what)
        assert "the server sends elsewhere: to localhost (region eu-west-1)" in message
        assert "set AWS_REGION or object_store_region" in message

    def test_while_data_is_read(self, on_server: FaultServer) -> None:
        with open_checkpoint(URL, **QUICK) as opened:
            on_server.fault = self.redirect
            with pytest.raises(CheckpointError, match="could not read: the server sends elsewhere: to localhost"):
                opened.get_tensor("t1")

    def test_while_a_training_checkpoint_is_written(self, on_server: FaultServer) -> None:
        on_server.fault = self.redirect
        files = S3FileSystem("us-east-1")
        with (
            pytest.raises(CheckpointError, match="the server sends elsewhere: to localhost"),
            files.create_stream("s3://bucket/run/part", "wb") as stream,
        ):
            stream.write(b"x")
        with pytest.raises(CheckpointError, match="could not look for the object: the server sends elsewhere"):
            files.exists("s3://bucket/run/part")
