"""What a server can do wrong while a checkpoint is read from it: borne where it may pass, else one clear error."""

import os
import signal
import threading
import traceback
from collections.abc import Callable
from typing import Any

import pytest

from engine_loader import CheckpointError, open_checkpoint
from engine_loader.sources.object_store.object_source import ObjectFile, ObjectStoreSource
from engine_loader.sources.registry import make_source
from tests.sources.object_store.model import CONTENT, IMPATIENT, KEY, KIB, QUICK, RIGHT, TENSORS, URL, load
from tests.support.checkpoints import checkpoint, entry
from tests.support.fault_server import Answer, Fault, FaultServer, Request, tag_of
from tests.support.waiting import wait_for


@pytest.fixture(autouse=True)
def _object(on_server: FaultServer) -> None:
    on_server.objects[KEY] = CONTENT


def bit_for_bit(loaded: dict[str, bytes]) -> bool:
    return loaded == RIGHT


def failure(**options: Any) -> str:
    with pytest.raises(CheckpointError) as raised:
        load(**options)
    assert raised.value.file == URL
    return str(raised.value)


def is_data(request: Request) -> bool:
    """Whether it is for tensors; the first request for content is for the header."""
    return request.method == "GET" and request.number > 0


def once(answer: Answer, wanted: Callable[[Request], bool] = is_data) -> Fault:
    """``answer`` to the first request that is ``wanted``."""
    lock, given = threading.Lock(), []

    def fault(request: Request) -> Answer | None:
        with lock:
            if given or not wanted(request):
                return None
            given.append(request)
            return answer

    return fault


def always(answer: Answer, wanted: Callable[[Request], bool] = is_data) -> Fault:
    return lambda request: answer if wanted(request) else None


PASSING = {
    "slow-down": Answer(status=503, code="SlowDown"),
    "too-many-requests": Answer(status=429, code="TooManyRequests"),
    "internal-error": Answer(status=500, code="InternalError"),
    "cut-short": Answer(cut=1000),
    "cut-before-the-first-byte": Answer(cut=0),
    "stalled": Answer(cut=1000, stall=True),
    "shorter-than-it-says": Answer(cut=1000, headers={"Content-Length": "1000"}),
}


def patience(fault: str) -> dict[str, Any]:
    return IMPATIENT if PASSING[fault].stall else {}


@pytest.mark.parametrize("etags", [True, False])
@pytest.mark.parametrize("fault", PASSING)
def test_what_passes_is_tried_again(fault: str, etags: bool, server: FaultServer) -> None:
    server.etags = etags
    server.fault = once(PASSING[fault])
    assert bit_for_bit(load(max_tries=4, **patience(fault)))


@pytest.mark.parametrize("fault", ["slow-down", "internal-error", "cut-short"])
def test_a_header_is_tried_again_too(fault: str, server: FaultServer) -> None:
    server.fault = once(PASSING[fault], lambda request: request.method == "GET" and "list-type" not in request.query)
    assert bit_for_bit(load())


@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_opening_is_tried_again(method: str, server: FaultServer) -> None:
    server.objects["bucket/dir/model.safetensors"] = CONTENT
    server.fault = once(PASSING["slow-down"], lambda request: request.method == method)
    with open_checkpoint("s3://bucket/dir", **QUICK) as opened:
        assert opened.keys() == list(TENSORS)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("slow-down", "the server answered 503 SlowDown after 2 tries (the server is overloaded or down"),
        ("internal-error", "the server answered 500 InternalError after 2 tries"),
        ("cut-before-the-first-byte", "[EREMOTEIO] after 2 tries"),
        ("stalled", "[ETIMEDOUT] after 2 tries"),
    ],
)
def test_what_does_not_pass_is_an_error_after_a_number_of_tries(fault: str, message: str, server: FaultServer) -> None:
    server.fault = always(PASSING[fault])
    # So large that the header comes by one request.
    one_range = {"object_store_requests": 1, "object_store_range_bytes": 256 * KIB}
    assert message in failure(**one_range, **patience(fault))
    assert len(server.gets()) < 12


def test_a_server_that_ignores_ranges_is_noticed(server: FaultServer) -> None:
    server.fault = always(Answer(ignore_range=True))
    assert "could not read: the server ignores ranges: it answers with the whole object" in failure()


@pytest.mark.parametrize("etags", [True, False])
def test_a_range_that_was_not_asked_for_is_noticed(etags: bool, server: FaultServer) -> None:
    server.etags = etags
    wrong = Answer(headers={"Content-Range": f"bytes 0-99/{len(CONTENT)}", "Content-Length": "100"}, cut=100)
    server.fault = always(wrong)
    assert "could not read: the server sent another range than was asked for" in failure()


class TestAnObjectThatIsReplaced:
    """While a checkpoint is read. What comes is never a mixture of two versions."""

    OTHER = checkpoint({name: entry("F32", shape, seed=77) for name, (_, shape, _) in TENSORS.items()})

    def test_is_noticed_by_the_server(self, server: FaultServer) -> None:
        with open_checkpoint(URL, **QUICK) as opened:
            server.objects[KEY] = self.OTHER
            with pytest.raises(CheckpointError, match=f"{URL}: at byte .*: the object was replaced while it was read"):
                opened.get_tensor("t3")

    def test_is_noticed_where_the_server_does_not_heed_if_match(self, server: FaultServer) -> None:
        etag = '"another"'
        server.fault = lambda request: (
            Answer(content=self.OTHER, headers={"ETag": etag}, etag=request.headers.get("if-match"))
            if is_data(request)
            else None
        )
        assert "the object was replaced while it was read" in failure()

    def test_is_noticed_by_its_size_without_etags(self, server: FaultServer) -> None:
        server.etags = False
        server.fault = always(Answer(content=CONTENT + b"x"))
        assert "the object was replaced while it was read" in failure()

    def test_is_noticed_by_its_time_without_etags(self, server: FaultServer) -> None:
        server.etags = False
        server.fault = always(Answer(content=self.OTHER, headers={"Last-Modified": "Tue, 02 Jan 2024 00:00:00 GMT"}))
        assert "the object was replaced while it was read" in failure()

    def test_by_a_shorter_one(self, server: FaultServer) -> None:
        with open_checkpoint(URL, **QUICK) as opened:
            server.objects[KEY] = CONTENT[:500]
            with pytest.raises(CheckpointError, match="the object was replaced while it was read"):
                opened.get_tensor("t7")

    def test_by_nothing(self, server: FaultServer) -> None:
        with open_checkpoint(URL, **QUICK) as opened:
            del server.objects[KEY]
            with pytest.raises(CheckpointError, match=r"there is no such object \(.*deleted meanwhile"):
                opened.get_tensor("t7")


def test_every_range_is_asked_for_on_the_condition_that_the_object_is_the_same(server: FaultServer) -> None:
    assert bit_for_bit(load())
    assert {request.headers.get("if-match") for request in server.gets()} == {tag_of(CONTENT)}


def test_a_weak_etag_is_compared_and_not_asked_for(server: FaultServer) -> None:
    server.fault = lambda request: Answer(etag=f"W/{tag_of(CONTENT)}")
    assert bit_for_bit(load())
    assert {request.headers.get("if-match") for request in server.gets()} == {None}


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (403, "AccessDenied", "access was denied (403 AccessDenied) (check the credentials"),
        (403, "InvalidAccessKeyId", "this endpoint does not know the access key"),
        (403, "SignatureDoesNotMatch", "check AWS_SECRET_ACCESS_KEY"),
        (403, "RequestTimeTooSkewed", "the clock of this machine is wrong"),
        (401, "Unauthorized", "access was denied (401 Unauthorized)"),
        (400, "ExpiredToken", "the server answered 400 ExpiredToken (the credentials have expired"),
        (400, "AuthorizationHeaderMalformed", "does the bucket lie in this region?"),
        (301, "PermanentRedirect", "the server sends elsewhere (does the bucket lie in this region?"),
        (404, "NoSuchBucket", "there is no such bucket (check the bucket's name"),
        (404, "NoSuchKey", "there is no such object"),
    ],
)
@pytest.mark.parametrize("where", ["open", "list", "read"])
def test_a_refusal_says_what_to_do(status: int, code: str, message: str, where: str, server: FaultServer) -> None:
    answer = Answer(status=status, code=code)
    server.fault = always(answer, is_data if where == "read" else lambda request: True)
    if where == "list":
        with pytest.raises(CheckpointError) as raised:
            open_checkpoint("s3://bucket/prefix", **QUICK)
        assert raised.value.file == "s3://bucket/prefix"
        assert message in str(raised.value) or code == "NoSuchKey"
        return
    assert message in failure()
    # None of these passes by asking again.
    assert len([request for request in server.requests if request.method == "HEAD"]) == 1


@pytest.mark.parametrize(
    ("status", "code", "text", "expected"),
    [
        (400, "KMS.DisabledException", "arn:aws:kms:x is disabled", "the server answered 400 KMS.DisabledException"),
        (403, "AccessDenied", "not authorized to perform: kms:Decrypt", "access was denied (403 AccessDenied)"),
        (403, "InvalidObjectState", "not valid for the storage class", "the object is archived"),
        (400, "InvalidRequest", "SSE-C &amp; &lt;key&gt;", "the server answered 400 InvalidRequest"),
    ],
)
@pytest.mark.parametrize("where", ["open", "read"])
def test_what_the_server_says_is_kept(
    status: int, code: str, text: str, expected: str, where: str, server: FaultServer
) -> None:
    server.fault = always(
        Answer(status=status, code=code, message=text), is_data if where == "read" else lambda request: True
    )
    message = failure()
    assert expected in message
    assert f"the server says: {text.replace('&amp;', '&').replace('&lt;', '<').replace('&gt;', '>')})" in message


def test_an_archived_object_is_not_a_matter_of_credentials(server: FaultServer) -> None:
    server.fault = always(Answer(status=403, code="InvalidObjectState"))
    message = failure()
    assert "the object is archived (" in message
    assert "restore it (aws s3api restore-object)" in message
    assert "check the credentials" not in message


def test_what_the_server_says_is_printable_and_short(server: FaultServer) -> None:
    text = "\x1b[31mred\x07 " + "x" * 100_000
    server.fault = always(Answer(status=403, code="AccessDenied", message=text))
    message = failure()
    assert "the server says: \\x1b[31mred\\x07 xxx" in message
    assert message.isprintable()
    assert len(message) < 1000


def test_a_server_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    message = failure()
    assert "could not open the object: the server cannot be reached after 2 tries" in message
    assert "AWS_ENDPOINT_URL" in message


def test_ctrl_c_ends_the_wait_for_a_listing(server: FaultServer) -> None:
    def fault(request: Request) -> Answer:
        os.kill(os.getpid(), signal.SIGINT)
        return Answer(cut=0, stall=True)

    server.fault = fault
    with pytest.raises(KeyboardInterrupt):
        open_checkpoint("s3://bucket/prefix", object_store_timeout_s=600, max_tries=1)
    assert len(server.requests) == 1


def test_connections_end_with_the_checkpoint(server: FaultServer) -> None:
    with open_checkpoint(URL, **QUICK) as opened:
        opened.get_tensor("t1")
        assert server.connections() > 0
    wait_for(lambda: not server.connections())


def test_after_close_nothing_is_read(server: FaultServer) -> None:
    source = make_source("auto")
    file = source.open(URL)
    assert isinstance(file, ObjectFile)
    file.close()
    file.close()
    with pytest.raises(CheckpointError, match="was closed while it was being read"):
        file.read_into(0, [memoryview(bytearray(8))])


def test_opening_a_bucket_or_listing_nothing_is_an_error() -> None:
    source = ObjectStoreSource()
    with pytest.raises(CheckpointError, match="this is a bucket where an object is meant"):
        source.open("s3://bucket/")
    with pytest.raises(CheckpointError, match="there is no object below this prefix"):
        source.list("s3://bucket/nothing")


class TestSecrets:
    """The address of a proxy may hold a password. obstore's own exception, which is our error's cause, names it."""

    @pytest.mark.parametrize("status", [None, 403, 404])
    def test_no_traceback_shows_the_password_of_an_endpoint(self, status: int | None, on_server: FaultServer) -> None:
        port = "9" if status is None else on_server.url.rpartition(":")[2]
        on_server.fault = always(Answer(status=status or 200, code="Whatever"), lambda request: True)
        user, password = "some" + "one", "pass:" + "w0rd"  # in parts, for tracebacks show the lines of this test
        with pytest.raises(CheckpointError) as raised:
            load(object_store_endpoint_url=f"http://{user}:{password}@127.0.0.1:{port}", max_tries=1)
        cause = raised.value.__cause__
        told = "".join(traceback.format_exception(raised.value))
        assert cause is not None
        assert f"http://***@127.0.0.1:{port}" in str(cause)
        assert password not in told
        assert user not in told
