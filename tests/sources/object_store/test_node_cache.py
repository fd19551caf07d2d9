"""The node's cache of weights: the second start asks the store for nothing, and no disk spoils a load."""

import errno
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine_loader import open_checkpoint
from engine_loader.sources.kept import node_cache
from engine_loader.sources.kept.node_cache import NodeCache
from tests.support.checkpoints import checkpoint, entry
from tests.support.fault_server import Answer, FaultServer, Request
from tests.support.waiting import wait_for

ROUNDS = 300 if os.environ.get("EXTENDED_TESTS") else 12
KIB, MIB = 1 << 10, 1 << 20
TENSORS = {f"t{number}": entry("U8", [500 * KIB], seed=number) for number in range(6)}
URL = "s3://bucket/model"


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer() as server:
        server.objects["bucket/model/model.safetensors"] = checkpoint(TENSORS)
        yield server


@pytest.fixture
def options(server: FaultServer, tmp_path: Path) -> dict[str, Any]:
    return {
        "object_store_endpoint_url": server.url,
        "object_store_anonymous": True,
        "object_store_range_bytes": 256 * KIB,
        "cache_directory": str(tmp_path / "cache"),
    }


@pytest.fixture(autouse=True)
def _caches_of_this_test() -> Iterator[None]:
    node_cache._cache_at.cache_clear()
    yield
    node_cache._cache_at.cache_clear()


def load(options: dict[str, Any]) -> dict[str, torch.Tensor]:
    """All tensors, checked; what is to be kept is on the disk afterwards."""
    with open_checkpoint(URL, **options) as opened:
        tensors = dict(opened.tensors())
    for name, tensor in tensors.items():
        assert bytes(tensor.numpy()) == TENSORS[name][2], name
    assert set(tensors) == set(TENSORS)
    cache = cache_of(options)
    if cache is not None:
        cache.flush(30)
    return tensors


def cache_of(options: dict[str, Any]) -> NodeCache | None:
    return node_cache._cache_at(options["cache_directory"], options.get("cache_bytes"))


def kept_in(options: dict[str, Any]) -> list[Path]:
    return sorted(Path(options["cache_directory"]).glob("*/*/*/*-*"))


def test_the_second_start_asks_for_nothing_but_what_there_is(server: FaultServer, options: dict[str, Any]) -> None:
    load(options)
    assert server.gets()
    server.requests.clear()
    node_cache._cache_at.cache_clear()  # as another process finds it
    with open_checkpoint(URL, **options) as opened:
        tensors = dict(opened.tensors())
    assert all(bytes(tensor.numpy()) == TENSORS[name][2] for name, tensor in tensors.items())
    assert server.gets() == []
    assert {request.method for request in server.requests} == {"HEAD", "GET"}  # size and ETag, and the listing


def test_where_it_came_from_is_told(server: FaultServer, options: dict[str, Any]) -> None:
    from engine_loader.report.load_report import LoadReport

    load(options)
    report = LoadReport()
    with open_checkpoint(URL, **options) as opened:
        dict(opened.tensors(report=report))
    assert ", from object_store, kept on this node (" in report.line()


def test_another_start_may_read_other_parts(server: FaultServer, options: dict[str, Any]) -> None:
    """What is kept serves ranges that are cut elsewhere; only what lies between is asked for."""
    with open_checkpoint(URL, **options) as opened:
        opened.get_slice("t1")[1000 : 300 * KIB]
        opened.get_slice("t4")[...]
    cache = cache_of(options)
    assert cache is not None and cache.flush(30)
    server.requests.clear()
    load({**options, "object_store_range_bytes": 100 * KIB})
    asked = sum(
        int(end) - int(begin) + 1
        for begin, end in (request.headers["range"].removeprefix("bytes=").split("-") for request in server.gets())
    )
    size = len(server.objects["bucket/model/model.safetensors"])
    assert size - 800 * KIB - 200 * KIB <= asked <= size - 790 * KIB
    server.requests.clear()
    load({**options, "object_store_range_bytes": 333 * KIB})
    assert server.gets() == []


def test_an_object_that_was_replaced_is_read_anew_and_the_old_one_goes(
    server: FaultServer, options: dict[str, Any]
) -> None:
    load(options)
    before = kept_in(options)
    changed = {name: entry("U8", [500 * KIB], seed=100 + number) for number, name in enumerate(TENSORS)}
    server.objects["bucket/model/model.safetensors"] = checkpoint(changed)
    with open_checkpoint(URL, **options) as opened:
        for name, tensor in opened.tensors():
            assert bytes(tensor.numpy()) == changed[name][2]
    assert not set(before) & set(kept_in(options))


def test_without_etags_nothing_is_kept(server: FaultServer, options: dict[str, Any]) -> None:
    server.etags = False
    load(options)
    assert kept_in(options) == []


def test_what_was_used_least_recently_goes_first(server: FaultServer, options: dict[str, Any]) -> None:
    other = "s3://bucket/other/model.safetensors"
    server.objects["bucket/other/model.safetensors"] = checkpoint(TENSORS)
    size = len(server.objects["bucket/other/model.safetensors"])
    options["cache_bytes"] = size + size // 2
    load(options)
    first = set(kept_in(options))
    os.utime(next(iter(first)).parent / ".used", (time.time() - 100, time.time() - 100))
    with open_checkpoint(other, **options) as opened:
        dict(opened.tensors())
    cache = cache_of(options)
    assert cache is not None and cache.flush(30)
    assert not first & set(kept_in(options))
    assert sum(path.stat().st_size for path in kept_in(options)) == pytest.approx(size, abs=192 * KIB)


def test_a_model_that_is_larger_than_the_cache_is_kept_in_part(
    server: FaultServer, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    options["cache_bytes"] = 1 * MIB
    with caplog.at_level(logging.WARNING):
        load(options)
    assert 512 * KIB < sum(path.stat().st_size for path in kept_in(options)) <= 1 * MIB
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("there is no more room for weights on this node (cache_bytes, or what the disk has free)")
    node_cache._cache_at.cache_clear()
    server.requests.clear()
    load(options)
    asked = len(server.gets())
    assert 0 < asked < len(TENSORS) * 2


def test_what_one_thread_still_writes_takes_room_from_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, first = threading.Event(), threading.Lock()

    def the_first_one_stands(path: Path, content: memoryview) -> None:
        if first.acquire(blocking=False):
            go_on.wait(60)
        path.write_bytes(content)

    monkeypatch.setattr(node_cache, "_write_whole", the_first_one_stands)
    cache = NodeCache(tmp_path, 256 * KIB)
    version = cache.version("s3://bucket/model", "tag", 1 * MIB)
    assert version is not None
    for number in range(3):
        cache.offer(version, number * 128 * KIB, np.zeros(128 * KIB, np.uint8))
    wait_for(lambda: cache._waiting_bytes == 128 * KIB)
    go_on.set()
    assert cache.flush(60)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*-*") if path.is_file()) == 256 * KIB


def test_a_disk_that_is_full_only_slows(
    server: FaultServer, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    written = 0

    def fails_later(path: Path, content: memoryview) -> None:
        nonlocal written
        written += 1
        if written > 3:
            path.write_bytes(content[:100])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        path.write_bytes(content)

    monkeypatch.setattr(node_cache, "_write_whole", fails_later)
    with caplog.at_level(logging.WARNING):
        load(options)
    assert 0 < len(kept_in(options)) <= 3
    assert list(Path(options["cache_directory"]).glob("*/*/*/.tmp*")) == []
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == [
        "No space left on device; from now on, what is read from object stores is not kept on this node"
    ]


def test_a_disk_that_hangs_costs_two_seconds_at_most_and_spoils_nothing(
    server: FaultServer, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    goes_on = threading.Event()
    monkeypatch.setattr(node_cache, "_write_whole", lambda path, content: goes_on.wait(60))
    monkeypatch.setattr(node_cache, "_WAITING_BYTES", 512 * KIB)
    monkeypatch.setattr(node_cache, "_PATIENCE_S", 0.2)
    with caplog.at_level(logging.WARNING), open_checkpoint(URL, **options) as opened:
        for name, tensor in opened.tensors():
            assert bytes(tensor.numpy()) == TENSORS[name][2]
    goes_on.set()
    assert any("the disk does not keep up" in record.getMessage() for record in caplog.records)


def test_files_that_are_cut_short_or_unreadable_are_read_from_the_store(
    server: FaultServer, options: dict[str, Any]
) -> None:
    load(options)
    first, second, third, *_ = kept_in(options)
    os.truncate(first, 10)
    second.unlink()
    third.unlink()
    third.mkdir()
    node_cache._cache_at.cache_clear()
    server.requests.clear()
    load(options)
    # The header and the first tensors lie in the first one: both ask, unless it is kept again in between.
    assert len({request.headers["range"].rpartition("-")[2] for request in server.gets()}) == 3


def test_a_directory_that_others_may_write_is_not_used(
    server: FaultServer, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    place = Path(options["cache_directory"], f"engine_loader-weights-{os.geteuid()}")
    place.mkdir(parents=True)
    place.chmod(0o777)
    with caplog.at_level(logging.WARNING):
        load(options)
    assert kept_in(options) == []
    assert "others may write there; weights are not kept on this node" in caplog.text


def test_a_directory_that_cannot_be_made_is_a_warning(
    server: FaultServer, options: dict[str, Any], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    options["cache_directory"] = str(tmp_path / "file" / "cache")
    with caplog.at_level(logging.WARNING):
        load(options)
    assert "is a file, not a directory; weights are not kept on this node" in caplog.text


def test_what_a_killed_process_left_is_removed_later(options: dict[str, Any], server: FaultServer) -> None:
    load(options)
    version = kept_in(options)[0].parent
    old, new = version / ".tmp-1-1", version / ".tmp-2-1"
    old.touch()
    new.touch()
    os.utime(old, (time.time() - 7200, time.time() - 7200))
    node_cache._cache_at.cache_clear()
    load(options)
    assert not old.exists()
    assert new.exists()


def test_an_object_that_changes_while_it_is_read_is_no_mixture(server: FaultServer, options: dict[str, Any]) -> None:
    load(options)
    kept_in(options)[3].unlink()
    changed = checkpoint({name: entry("U8", [500 * KIB], seed=50) for name in TENSORS})

    def replaces(request: Request) -> Answer | None:
        if request.method == "GET" and "range" in request.headers:
            server.objects["bucket/model/model.safetensors"] = changed
        return None

    server.fault = replaces
    from engine_loader import CheckpointError

    with pytest.raises(CheckpointError, match="the object was replaced while it was read"):
        load(options)


@pytest.mark.timeout(2000)
def test_seeded_rounds_of_kills_full_disks_and_changes_give_right_bytes(tmp_path: Path) -> None:
    directory = tmp_path / "cache"
    directory.mkdir()
    with FaultServer() as server:
        command = [sys.executable, "-m", "tests.sources.object_store.kept_rounds", server.url, str(directory)]
        done = subprocess.run(
            [*command, "20261130", str(ROUNDS)], capture_output=True, text=True, timeout=1800, check=False
        )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert set(told) <= {
        *("status 0", "killed", "changed", "cut", "delete", "delete version", "directory", "nothing", "small disk")
    }, (told, done.stderr[-3000:])
    assert told["status 0"] > ROUNDS // 2
