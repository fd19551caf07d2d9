"""Large ranges are received straight into their memory: the right bytes, or what obstore says about the failure."""

import threading
from collections.abc import Callable

import pytest

from engine_loader import CheckpointError, open_checkpoint
from engine_loader.sources.object_store import ranges as object_ranges
from engine_loader.sources.object_store.client import ObjectStoreOptions
from engine_loader.sources.object_store.object_source import ObjectStoreSource
from tests.sources.object_store.model import CONTENT, IMPATIENT, KEY, KIB, QUICK, RIGHT, TENSORS, URL, load
from tests.support.checkpoints import noise, tensor_bytes
from tests.support.fault_server import Answer, FaultServer, Request, tag_of
from tests.support.s3_server import S3Server
from tests.support.waiting import wait_for


@pytest.fixture(autouse=True)
def _small_ones_too(on_server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_ranges, "MIN_BYTES", 1)
    on_server.objects[KEY] = CONTENT


def is_direct(request: Request) -> bool:
    """Whether it did not come from obstore, which signs by a header."""
    return request.method == "GET" and "authorization" not in request.headers


def once(answer: Answer, wanted: Callable[[Request], bool]) -> Callable[[Request], Answer | None]:
    lock, given = threading.Lock(), []

    def fault(request: Request) -> Answer | None:
        with lock:
            if given or not wanted(request) or request.number < 2:
                return None
            given.append(request)
            return answer

    return fault


def test_all_ranges_go_this_way_and_are_signed(server: FaultServer) -> None:
    assert load() == RIGHT
    assert all(map(is_direct, server.gets()))
    for request in server.gets():
        assert request.query["X-Amz-Credential"][0].startswith("test/")
        assert request.query["X-Amz-Signature"]
        assert request.headers["if-match"] == tag_of(CONTENT)


def test_without_a_signature_for_public_buckets(server: FaultServer) -> None:
    assert load(object_store_anonymous=True) == RIGHT
    assert not any(request.query for request in server.gets())


def test_connections_are_used_again_and_end_with_the_checkpoint(server: FaultServer) -> None:
    with open_checkpoint(URL, **{**QUICK, "object_store_requests": 1}) as opened:
        for name in opened.keys():  # noqa: SIM118
            opened.get_tensor(name)
            assert server.connections() <= 3  # of obstore, of opening, of the engine's thread
    wait_for(lambda: not server.connections())


def test_a_connection_that_the_server_has_closed_is_replaced(server: FaultServer) -> None:
    with open_checkpoint(URL, **{**QUICK, "object_store_requests": 1}) as opened:
        server.fault = once(Answer(headers={"Connection": "close"}), is_direct)
        assert all(tensor_bytes(opened.get_tensor(name)) == content for name, content in RIGHT.items())
    assert sum(map(is_direct, server.gets())) >= len(TENSORS)


@pytest.mark.parametrize(
    "answer",
    [
        Answer(status=503, code="SlowDown"),
        Answer(status=403, code="AccessDenied"),
        Answer(ignore_range=True),
        Answer(etag='"another"'),
        Answer(headers={"Content-Encoding": "gzip"}),
        Answer(headers={"Content-Range": f"bytes 0-99/{len(CONTENT)}", "Content-Length": "100"}, cut=100),
        Answer(headers={"Content-Range": "nonsense"}),
    ],
    ids=["503", "403", "whole", "etag", "encoded", "range", "nonsense"],
)
def test_what_is_not_right_is_left_to_obstore(answer: Answer, server: FaultServer) -> None:
    server.fault = lambda request: answer if is_direct(request) else None
    assert load(object_store_requests=1) == RIGHT
    assert sum(map(is_direct, server.gets())) == 1


@pytest.mark.parametrize("cut", [0, 1000])
@pytest.mark.parametrize("stall", [False, True])
def test_a_body_that_breaks_off_or_stalls_is_asked_for_again(cut: int, stall: bool, server: FaultServer) -> None:
    server.fault = once(Answer(cut=cut, stall=stall), is_direct)
    patience = IMPATIENT if stall else {}
    assert load(max_tries=3, **patience) == RIGHT
    server.requests.clear()
    server.fault = lambda request: Answer(cut=cut, stall=stall) if request.number > 0 else None
    with pytest.raises(CheckpointError, match=r"\[ETIMEDOUT\] after 2" if stall else r"\[EREMOTEIO\] after 2"):
        load(object_store_requests=1, object_store_range_bytes=256 * KIB, **patience)


@pytest.mark.parametrize("etags", [True, False])
def test_an_object_that_is_replaced(etags: bool, server: FaultServer) -> None:
    server.etags = etags
    with open_checkpoint(URL, **QUICK) as opened:
        server.objects[KEY] = noise(len(CONTENT) + 1)
        with pytest.raises(CheckpointError, match="the object was replaced while it was read"):
            opened.get_tensor("t3")


def test_behind_a_proxy_obstore_asks(server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", server.url)
    assert load(object_store_endpoint_url="http://store.test") == RIGHT
    assert not any(map(is_direct, server.requests))


def test_any_key_and_any_buffers_of_s3(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.url)
    content, key = noise(5000), "deep/er/a key+with %20 ü#?&"
    s3.put("ranges", {key: content})
    source = ObjectStoreSource(ObjectStoreOptions(range_bytes=3000))
    file = source.open(f"s3://ranges/{key}")
    for offset, sizes in ((0, [10, 0, 500]), (7, [1, 1, 1]), (4000, [900, 900]), (100, [4000]), (5000, [4])):
        buffers = [memoryview(bytearray(size)) for size in sizes]
        got = file.read_into(offset, buffers)
        assert got == min(sum(sizes), 3000, 5000 - offset)
        assert b"".join(buffers)[:got] == content[offset : offset + got]
    file.close()
