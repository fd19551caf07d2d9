"""Who signs: the profiles, processes and services of AWS that give out credentials, those that fail among them."""

import json
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from engine_loader import CheckpointError, open_checkpoint
from engine_loader.dcp import S3ClientConfig, S3StorageReader
from engine_loader.sources.object_store import aws_credentials
from engine_loader.sources.object_store.client import ObjectStoreOptions
from engine_loader.sources.object_store.object_source import ObjectStoreSource
from tests.sources.object_store.model import CONTENT, KEY, KIB, RIGHT, URL, load
from tests.support.certificates import Authority
from tests.support.checkpoints import tensor_bytes
from tests.support.credential_services import CredentialServices, Refusal
from tests.support.fault_server import Answer, FaultServer, Request

_MORE_THAN_A_BACKOFF_S = 0.15
"""obstore fetches no credentials twice within 0.1 s."""
ROLES = "/latest/meta-data/iam/security-credentials/"


@pytest.fixture(autouse=True)
def _nobody(on_server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is an object, and nothing that says who may read it; earlier failures are forgotten."""
    on_server.objects[KEY] = CONTENT
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setattr(aws_credentials, "_failures", {})


@pytest.fixture
def services() -> Iterator[CredentialServices]:
    with CredentialServices() as running:
        yield running


@pytest.fixture
def on_instance(services: CredentialServices, monkeypatch: pytest.MonkeyPatch) -> CredentialServices:
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", services.url)
    return services


@pytest.fixture
def in_container(services: CredentialServices, monkeypatch: pytest.MonkeyPatch) -> CredentialServices:
    monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"{services.url}/container")
    return services


@pytest.fixture
def with_identity(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[CredentialServices]:
    authority = Authority(tmp_path)
    monkeypatch.setenv("AWS_CA_BUNDLE", str(authority.bundle))
    (tmp_path / "identity").write_text("IDENTITY")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "identity"))
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/reader")
    with CredentialServices(tls=authority.context) as services:
        monkeypatch.setenv("AWS_ENDPOINT_URL_STS", f"{services.url}/sts")
        yield services


def signers(server: FaultServer) -> set[tuple[str, str | None]]:
    """Key and session token of every request."""
    found = set()
    for request in server.requests:
        if "authorization" in request.headers:
            key = request.headers["authorization"].partition("Credential=")[2].partition("/")[0]
            found.add((key, request.headers.get("x-amz-security-token")))
        else:
            key = unquote(request.query["X-Amz-Credential"][0]).partition("/")[0]
            found.add((key, request.query.get("X-Amz-Security-Token", [None])[0]))
    return found


def failure() -> str:
    with pytest.raises(CheckpointError) as raised:
        load()
    return str(raised.value)


class TestTheInstancesRole:
    def test_signs(self, on_instance: CredentialServices, server: FaultServer) -> None:
        assert load() == RIGHT
        assert signers(server) == {("KEY1", "TOKEN1")}
        assert on_instance.paths() == ["PUT /latest/api/token", f"GET {ROLES}", f"GET {ROLES}the-role"]

    def test_a_service_that_never_answers_is_asked_twice_in_all(
        self, on_instance: CredentialServices, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(aws_credentials, "_TIMEOUT_S", 0.3)
        on_instance.refuse = lambda asked: Refusal()
        for _ in range(3):
            message = failure()
            assert "no credentials were found: none is set, and the instance metadata service does not ans" in message
            assert "AWS_ACCESS_KEY_ID" in message
        assert on_instance.paths() == ["PUT /latest/api/token"] * 2

    def test_a_training_checkpoint_asks_twice_in_all(
        self, on_instance: CredentialServices, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(aws_credentials, "_TIMEOUT_S", 0.3)
        on_instance.refuse = lambda asked: Refusal()
        with pytest.raises(CheckpointException, match="no credentials were found"):
            dcp.load(
                {"t": torch.zeros(2)},
                storage_reader=S3StorageReader("us-east-1", "s3://bucket/run"),
                no_dist=True,
            )
        assert on_instance.paths() == ["PUT /latest/api/token"] * 2

    def test_waits_a_few_seconds_at_most(self) -> None:
        assert aws_credentials._TIMEOUT_S * aws_credentials._TRIES <= 5

    def test_an_instance_without_a_role(self, on_instance: CredentialServices) -> None:
        on_instance.refuse = lambda asked: Refusal(404) if asked.path == ROLES else None
        assert "the instance metadata service answered 404" in failure()

    @pytest.mark.parametrize("body", ["", "[]", "nonsense", '{"Code": "Failed"}', '{"AccessKeyId": "a"}'])
    def test_an_answer_that_is_no_credentials(self, body: str, on_instance: CredentialServices) -> None:
        on_instance.refuse = lambda asked: Refusal(200, body) if asked.path == f"{ROLES}the-role" else None
        assert "no credentials were found: the answer holds no credentials" in failure()

    def test_where_nothing_listens(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")
        assert "the instance metadata service cannot be reached" in failure()

    def test_can_be_switched_off(self, on_instance: CredentialServices, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        assert "is switched off (AWS_EC2_METADATA_DISABLED)" in failure()
        assert not on_instance.asked

    def test_is_not_asked_by_a_proxy(
        self, on_instance: CredentialServices, server: FaultServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HTTP_PROXY", server.url)
        assert load() == RIGHT
        assert on_instance.given == 1

    def test_is_not_asked_for_public_objects(self, on_instance: CredentialServices) -> None:
        assert load(object_store_anonymous=True) == RIGHT
        assert not on_instance.asked


class TestAContainersService:
    def test_signs(self, in_container: CredentialServices, server: FaultServer) -> None:
        assert load() == RIGHT
        assert signers(server) == {("KEY1", "TOKEN1")}

    @pytest.mark.parametrize("as_file", [False, True])
    def test_is_told_the_containers_token(
        self, as_file: bool, in_container: CredentialServices, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        if as_file:
            (tmp_path / "token").write_text("SECRET\n")
            monkeypatch.setenv("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", str(tmp_path / "token"))
        else:
            monkeypatch.setenv("AWS_CONTAINER_AUTHORIZATION_TOKEN", "SECRET")
        assert load() == RIGHT
        assert [asked.headers["authorization"] for asked in in_container.asked] == ["SECRET"]

    def test_that_never_answers(self, in_container: CredentialServices, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(aws_credentials, "_TIMEOUT_S", 0.3)
        in_container.refuse = lambda asked: Refusal()
        assert "the container's credentials service does not answer" in failure()
        assert in_container.paths() == ["GET /container"] * 2

    def test_that_fails_once(self, in_container: CredentialServices) -> None:
        in_container.refuse = lambda asked: Refusal(500) if len(in_container.asked) == 1 else None
        assert load() == RIGHT


class TestAWebIdentity:
    def test_signs(self, with_identity: CredentialServices, server: FaultServer) -> None:
        assert load() == RIGHT
        assert signers(server) == {("KEY1", "TOKEN1")}
        (asked,) = with_identity.asked
        assert asked.query["WebIdentityToken"] == ["IDENTITY"]
        assert asked.query["RoleArn"] == ["arn:aws:iam::123456789012:role/reader"]

    def test_that_is_refused_says_what_sts_says(self, with_identity: CredentialServices) -> None:
        body = "<Error><Code>InvalidIdentityToken</Code><Message>No OpenIDConnect provider found</Message></Error>"
        with_identity.refuse = lambda asked: Refusal(400, body)
        message = failure()
        assert "InvalidIdentityToken" in message
        assert "No OpenIDConnect provider found" in message

    def test_an_sts_that_never_answers(
        self, with_identity: CredentialServices, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(aws_credentials, "_STS_TIMEOUT_S", 0.5)
        with_identity.refuse = lambda asked: Refusal()
        for _ in range(2):
            assert "no credentials were found: none is set, and STS (127.0.0.1) does not answer" in failure()
        assert with_identity.paths() == ["POST /sts"] * 2

    def test_that_cannot_be_read(self, with_identity: CredentialServices, tmp_path: Path) -> None:
        (tmp_path / "identity").unlink()
        assert f"the token in {tmp_path}/identity cannot be read" in failure()
        assert not with_identity.asked

    def test_whose_sts_is_not_trusted(self, with_identity: CredentialServices, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("AWS_CA_BUNDLE")
        assert "STS (127.0.0.1) cannot be reached ([SSL: CERTIFICATE_VERIFY_FAILED]" in failure()

    @pytest.mark.usefixtures("with_identity")
    def test_whose_sts_is_behind_a_proxy(self, server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("AWS_ENDPOINT_URL_STS")
        monkeypatch.setenv("HTTPS_PROXY", server.url)
        monkeypatch.setenv("AWS_REGION", "cn-north-1")
        failure()
        asked = {request.key for request in server.requests if request.method == "CONNECT"}
        assert asked == {"sts.cn-north-1.amazonaws.com.cn:443"}


class TestProfiles:
    @pytest.fixture(autouse=True)
    def _profiles(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        said = {"Version": 1, "AccessKeyId": "PROCESS", "SecretAccessKey": "x", "SessionToken": "ITS"}
        script = tmp_path / "process.py"
        script.write_text(f"print({json.dumps(json.dumps(said))})")
        (tmp_path / "failing.py").write_text("import sys; sys.exit('no such\\x1b[31m user')")
        (tmp_path / "credentials").write_text("[plain]\naws_access_key_id = PLAIN\naws_secret_access_key = x\n")
        (tmp_path / "config").write_text(
            f"[profile process]\ncredential_process = {sys.executable} {script}\n"
            f"[profile failing]\ncredential_process = {sys.executable} {tmp_path}/failing.py\n"
            "[profile missing]\ncredential_process = /no/such/program\n"
            "[profile half]\naws_access_key_id = HALF\n"
        )
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))

    def test_the_environments_token_does_not_go_with_a_profiles_keys(
        self, server: FaultServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("AWS_PROFILE", "plain")
        monkeypatch.setenv("AWS_SESSION_TOKEN", "OF-OTHER-KEYS")
        assert load() == RIGHT
        assert signers(server) == {("PLAIN", None)}

    def test_nor_with_those_of_a_profile_that_is_given(
        self, server: FaultServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("AWS_SESSION_TOKEN", "OF-OTHER-KEYS")
        reader = S3StorageReader("us-east-1", "s3://bucket/run", S3ClientConfig(profile="plain"))
        with pytest.raises(CheckpointError):
            reader.read_metadata()
        assert signers(server) == {("PLAIN", None)}

    def test_a_process(self, server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_PROFILE", "process")
        assert load() == RIGHT
        assert signers(server) == {("PROCESS", "ITS")}

    @pytest.mark.parametrize(
        ("profile", "message"),
        [
            ("failing", "credential_process ended with status 1: no such\\x1b[31m user"),
            ("missing", "credential_process could not be run: FileNotFoundError"),
            ("half", "the AWS profile 'half' has no aws_secret_access_key"),
        ],
    )
    def test_that_cannot_be_used(self, profile: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_PROFILE", profile)
        assert message in failure()


class TestExpiry:
    """While a long load goes on."""

    @pytest.mark.parametrize("kind", ["on_instance", "in_container", "with_identity"])
    def test_credentials_are_fetched_again_before_they_expire(
        self, kind: str, server: FaultServer, request: pytest.FixtureRequest
    ) -> None:
        services: CredentialServices = request.getfixturevalue(kind)
        services.lifetime = timedelta(seconds=60)  # less than what obstore wants to be left
        with open_checkpoint(URL, object_store_range_bytes=64 * KIB, object_store_requests=1) as opened:
            before = services.given
            for name in list(RIGHT)[:3]:
                time.sleep(_MORE_THAN_A_BACKOFF_S)
                opened.get_tensor(name)
        assert services.given > before
        assert len(signers(server)) > 1

    def test_credentials_that_are_still_valid_are_used_while_the_service_fails(
        self, in_container: CredentialServices, server: FaultServer
    ) -> None:
        in_container.lifetime = timedelta(seconds=60)
        in_container.refuse = lambda asked: Refusal(500) if in_container.given else None
        with open_checkpoint(URL, object_store_range_bytes=64 * KIB, object_store_requests=1) as opened:
            time.sleep(_MORE_THAN_A_BACKOFF_S)
            assert tensor_bytes(opened.get_tensor("t3")) == RIGHT["t3"]
        assert len(in_container.asked) > 1
        assert signers(server) == {("KEY1", "TOKEN1")}

    def test_credentials_that_have_expired_are_not(self, in_container: CredentialServices) -> None:
        in_container.lifetime = timedelta(seconds=-1)
        in_container.refuse = lambda asked: Refusal(500) if in_container.given else None
        with (
            pytest.raises(CheckpointError, match="the container's credentials service answered 500"),
            open_checkpoint(URL, object_store_range_bytes=64 * KIB, object_store_requests=1) as opened,
        ):
            time.sleep(_MORE_THAN_A_BACKOFF_S)
            opened.get_tensor("t3")

    def test_a_url_whose_credentials_expired_is_signed_anew(
        self, in_container: CredentialServices, server: FaultServer
    ) -> None:
        in_container.lifetime = timedelta(seconds=60)
        content = bytes(range(256)) * (16 << 10)
        server.objects["bucket/large"] = content
        expired: list[str] = []

        def fault(request: Request) -> Answer | None:
            if "X-Amz-Signature" in request.query and not expired:
                expired.append(request.key)
                return Answer(status=400, code="ExpiredToken")
            return None

        server.fault = fault
        file = ObjectStoreSource(ObjectStoreOptions(range_bytes=1 << 20)).open("s3://bucket/large")
        buffer = bytearray(len(content))
        for offset in range(0, len(content), 1 << 20):
            time.sleep(_MORE_THAN_A_BACKOFF_S)
            assert file.read_into(offset, [memoryview(buffer)[offset : offset + (1 << 20)]]) == 1 << 20
        assert buffer == content
        assert expired
        presigned = {
            request.query["X-Amz-Security-Token"][0]
            for request in server.requests
            if "X-Amz-Signature" in request.query
        }
        assert len(presigned) == 2
