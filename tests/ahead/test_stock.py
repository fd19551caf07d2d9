"""Weights that were read into memory ahead of their loader: what it gets is what the files hold, whatever happened."""

import fcntl
import json
import logging
import mmap
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ByteSize

from engine_loader.ahead import handing_over, keeper
from engine_loader.ahead.handing_over import SEALS, hand_over, taken_over
from engine_loader.ahead.keeper import Keeper
from engine_loader.ahead.stock_filling import FULL, Filling
from engine_loader.ahead.stocking import stock_files
from engine_loader.engines.common.reading import read_weights
from engine_loader.engines.common.start.warm_weights import begin_to_warm, stock_described
from engine_loader.loading.find import TrainingCheckpoint
from engine_loader.machine import Memory
from engine_loader.settings import LoaderSettings
from engine_loader.sources.stock import StockedPart
from engine_loader.start.page_reading import NO_ROOM, Budget
from engine_loader.start.page_warmer import listen, name_of
from engine_loader.start.warming import WarmingAccount
from tests.start.test_warming import memory_group, remove_group
from tests.support.checkpoints import checkpoint, entry
from tests.support.children import NOBODY, in_child
from tests.support.fault_server import Answer, FaultServer, Request
from tests.support.threefs import machine_with_3fs
from tests.support.training_checkpoints import save_chunked
from tests.support.waiting import GENEROUS_S, LAST_S, wait_for

MIB = 1 << 20
ENTRIES = {f"t{number}": entry("U8", [3 * MIB + 100 * number], seed=number) for number in range(3)}
MORE = {"small": entry("F32", [5], seed=7), "u": entry("U8", [2 * MIB + 1], seed=8)}
SIZE = sum(len(checkpoint(tensors)) for tensors in (ENTRIES, MORE))
NAMES = {"model-1.safetensors": ENTRIES, "model-2.safetensors": MORE}
ROOM = Memory(total=64 << 30, available=32 << 30, limit=None)
log = logging.getLogger("engine_loader.tests")


class Place:
    """Where the two files are, how they are read, and how much of them was.

    Attributes:
        paths: of the files.
        settings: for reading them there.
        bytes_read: what has been read from there so far; None: nobody counts.
    """

    def __init__(self, paths: list[str], settings: LoaderSettings, bytes_read: Callable[[], int] | None = None) -> None:
        self.paths = paths
        self.settings = settings
        self.bytes_read = bytes_read


@contextmanager
def on_disk(directory: Path) -> Iterator[Place]:
    for name, tensors in NAMES.items():
        (directory / name).write_bytes(checkpoint(tensors))
    yield Place([str(directory / name) for name in NAMES], LoaderSettings(read_mode="direct"))


@contextmanager
def on_3fs(patch: pytest.MonkeyPatch) -> Iterator[Place]:
    with machine_with_3fs(patch) as emulator:
        paths = [emulator.mount / name for name in NAMES]
        for path, tensors in zip(paths, NAMES.values(), strict=True):
            path.write_bytes(checkpoint(tensors))
        try:
            yield Place([str(path) for path in paths], LoaderSettings(), lambda: emulator.bytes_of_all)
        finally:
            for path in paths:
                path.unlink()


@contextmanager
def on_s3() -> Iterator[Place]:
    with FaultServer() as server:
        for name, tensors in NAMES.items():
            server.objects[f"bucket/model/{name}"] = checkpoint(tensors)
        settings = LoaderSettings(
            object_store_endpoint_url=server.url, object_store_anonymous=True, object_store_range_bytes=ByteSize(MIB)
        )
        yield Place([f"s3://bucket/model/{name}" for name in NAMES], settings, lambda: len(server.gets()))


@pytest.fixture(params=["disk", "3fs", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    found = {"disk": lambda: on_disk(tmp_path), "3fs": lambda: on_3fs(monkeypatch), "s3": on_s3}[request.param]()
    with found as place:
        yield place


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Place]:
    with on_disk(tmp_path) as place:
        yield place


@contextmanager
def kept(
    place: Place, *, most_bytes: int = 64 * MIB, room: Memory = ROOM, ready: bool = True
) -> Iterator[tuple[Filling, threading.Thread, list[Mapping[str, object]]]]:
    """The files on their way into memory, and on their way out: the filling, who keeps it, and what that has said."""
    listening = listen(place.paths[0], handing_over.server_of(place.paths[0], place.settings))
    assert listening is not None
    told: list[Mapping[str, object]] = []
    lifeline, others = os.pipe()
    with listening:
        filling = Filling(place.paths, {}, place.settings, most_bytes, Budget(lambda: room, freed=False))
        serving = Keeper(filling, listening, lifeline, told.append)
        thread = threading.Thread(target=serving.serve, daemon=True)
        thread.start()
        try:
            if ready:
                wait_for(lambda: told)
            yield filling, thread, told
        finally:
            os.close(others)
            thread.join(GENEROUS_S)
            os.close(lifeline)
    filling.close()
    assert not thread.is_alive()


def loaded(place: Place, caplog: pytest.LogCaptureFixture, weights: Any = None) -> str:
    """Load the files as an engine does, check every tensor, and return what the log says of it."""
    caplog.set_level(logging.INFO, log.name)
    caplog.clear()
    found = dict(read_weights(weights or place.paths, place.settings, log=log, show_progress=False))
    expected = ENTRIES | MORE
    assert sorted(found) == sorted(expected)
    for name, tensor in found.items():
        assert tensor.contiguous().view(torch.uint8).numpy().tobytes() == expected[name][2], name
    del found, tensor
    return "\n".join(record.getMessage() for record in caplog.records if record.name == log.name)


def bytes_ahead(said: str) -> str:
    """How much was read ahead, in the log's words; "" for nothing."""
    found = re.search(r"([\d.]+ [KM]iB) of it were read ahead", said)
    return found[1] if found else ""


@pytest.mark.parametrize("engine", ["auto", "python"])
def test_what_was_read_ahead_is_not_read_again(place: Place, engine: str, caplog: pytest.LogCaptureFixture) -> None:
    place.settings = place.settings.model_copy(update={"engine": engine})
    with kept(place) as (_, _, told):
        assert told == [{"read": SIZE, "reason": ""}]
        before = place.bytes_read() if place.bytes_read else 0
        said = loaded(place, caplog)
        assert (place.bytes_read() if place.bytes_read else 0) == before
    assert bytes_ahead(said) == f"{sum(len(item[2]) for item in (ENTRIES | MORE).values()) / MIB:.1f} MiB"


def test_what_was_not_is_read_from_its_file(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    with kept(place, most_bytes=7 * MIB) as (_, _, told):
        assert told == [{"read": 7 * MIB, "reason": FULL}]
        assert bytes_ahead(loaded(place, caplog)) == "6.00 MiB"  # two tensors; a third is there in part only


def test_every_rank_gets_it(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    with kept(place):
        first, second = taken_over(place.paths[0], place.settings), taken_over(place.paths[1], place.settings)
        assert first is not None
        assert second is not None
        assert first.size == second.size == SIZE
        assert bytes_ahead(loaded(place, caplog))
        first.close()
        second.close()


def test_a_loader_that_comes_early_takes_what_is_there(caplog: pytest.LogCaptureFixture) -> None:
    with on_s3() as place, FaultServer() as server:
        server.objects.update({f"bucket/model/{name}": checkpoint(tensors) for name, tensors in NAMES.items()})
        begun, go = threading.Event(), threading.Event()

        def fault(request: Request) -> Answer | None:
            if request.method == "GET" and request.headers.get("range", "").startswith(f"bytes={5 * MIB}-"):
                begun.set()
                go.wait(GENEROUS_S)
            return None

        server.fault = fault
        place.settings = place.settings.model_copy(update={"object_store_endpoint_url": server.url})
        with kept(place, ready=False) as (filling, _, told):
            assert begun.wait(GENEROUS_S)
            wait_for(lambda: filling.read >= 4 * MIB)
            stock = taken_over(place.paths[0], place.settings)
            assert stock is not None
            assert told[0]["reason"] == "the loader began"
            there = stock.size
            assert 4 * MIB <= there < SIZE
            go.set()
            stock.close()
            loaded(place, caplog)


def test_of_a_file_that_was_replaced_nothing_is_taken(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    if place.paths[0].startswith("s3:"):
        pytest.skip("an object's version is in its ETag, see the test below")
    other = {name: entry("U8", [3 * MIB + 100 * number], seed=50 + number) for number, name in enumerate(ENTRIES)}
    with kept(place):
        path = Path(place.paths[0])
        path.with_suffix(".new").write_bytes(checkpoint(other))
        path.with_suffix(".new").replace(path)
        found = dict(read_weights(place.paths, place.settings, log=log, show_progress=False))
    for name, item in other.items():
        assert found[name].numpy().tobytes() == item[2]


def test_of_an_object_that_was_replaced_nothing_is_taken() -> None:
    other = {name: entry("U8", [3 * MIB + 100 * number], seed=50 + number) for number, name in enumerate(ENTRIES)}
    with FaultServer() as server:
        for name, tensors in NAMES.items():
            server.objects[f"bucket/model/{name}"] = checkpoint(tensors)
        settings = LoaderSettings(object_store_endpoint_url=server.url, object_store_anonymous=True)
        place = Place([f"s3://bucket/model/{name}" for name in NAMES], settings)
        with kept(place):
            server.objects["bucket/model/model-1.safetensors"] = checkpoint(other)
            found = dict(read_weights(place.paths, settings, log=log, show_progress=False))
    for name, item in other.items():
        assert found[name].numpy().tobytes() == item[2]


def test_a_training_checkpoint_is_taken_over_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = tmp_path / "step-1"
    tensors = {f"model.{number}.weight": torch.full((512, 1024), float(number)) for number in range(2)}
    save_chunked(tensors, directory, lambda _, tensor: [[tensor.shape[0] // 2]])
    paths = sorted(map(str, [directory / ".metadata", *directory.glob("*.distcp")]))
    place = Place(paths, LoaderSettings(read_mode="direct"))
    caplog.set_level(logging.INFO, log.name)
    with kept(place):
        weights = TrainingCheckpoint(str(directory))
        found = dict(read_weights(weights, place.settings, log=log, show_progress=False))
        for name, tensor in tensors.items():
            assert torch.equal(found[name], tensor)
    assert bytes_ahead(caplog.text) == "4.08 MiB"  # with what lies around the tensors


def test_no_more_is_read_than_there_is_room_for(disk: Place, caplog: pytest.LogCaptureFixture) -> None:
    little = Memory(total=2 << 30, available=(512 << 20) + 5 * MIB, limit=2 << 30)  # a quarter is the engine's
    with kept(disk, room=little) as (filling, _, told):
        assert told[0]["reason"] == NO_ROOM
        assert filling.read <= 5 * MIB
        loaded(disk, caplog)


def test_memory_that_is_kept_does_not_count_as_room() -> None:
    room = [100 * MIB]
    now = Memory(total=64 << 30, available=0, limit=512 * MIB)
    budget = Budget(lambda: Memory(now.total, (256 << 20) + room[0], now.limit), freed=False)
    assert budget.take(60 * MIB)
    assert not budget.take(60 * MIB)
    room[0] = 40 * MIB
    budget._seen = (-1.0, 0)  # a moment later
    assert not budget.take(60 * MIB)
    assert budget.take(30 * MIB)


@pytest.mark.parametrize("accelerator", [True, False])
def test_room_is_left_for_the_parameters_where_they_come_into_the_same_memory(
    place: Place, accelerator: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper, "has_accelerator", lambda: accelerator)
    expected = 0 if accelerator else SIZE
    assert keeper.memory_for_weights([*place.paths, "/missing"], {}, place.settings) == expected
    ranges = {place.paths[0]: [(0, 10), (100, 5)]}
    expected = 0 if accelerator else 15 + len(checkpoint(MORE))
    assert keeper.memory_for_weights(place.paths, ranges, place.settings) == expected
    budget = Budget(lambda: Memory(2 << 30, (512 << 20) + 9 * MIB, None), freed=False, for_weights=5 * MIB)
    assert not budget.take(5 * MIB)
    assert budget.take(4 * MIB)


def test_a_limit_of_the_cgroup_is_not_passed(tmp_path: Path) -> None:
    limit, size, file = 1 << 30, 500 * MIB, tmp_path / "large.safetensors"
    with file.open("wb") as made:  # without blocks on the disk
        made.truncate(size)
    place = Place([str(file)], LoaderSettings(read_mode="direct"))
    group = memory_group(limit)
    try:

        def run() -> WarmingAccount:
            (group / "cgroup.procs").write_text(str(os.getpid()))
            told: list[WarmingAccount] = []
            arguments = (place.paths, {}, place.settings, 8 << 30, told.append)
            threading.Thread(target=stock_files, args=arguments, daemon=True).start()
            wait_for(lambda: told, LAST_S)
            return told[0]

        account = in_child(run, timeout_s=int(LAST_S))
        most = next(path for name in ("memory.max_usage_in_bytes", "memory.peak") if (path := group / name).exists())
        assert account.reason == NO_ROOM == "there is no room for more"
        # A quarter is the reserve, and as much as the file has is for the parameters.
        assert 0 < account.read <= limit * 3 // 4 - size
        assert int(most.read_text()) < limit
    finally:
        remove_group(group)


def test_whoever_takes_it_can_only_read(disk: Place) -> None:
    with kept(disk):
        stock = taken_over(disk.paths[0], disk.settings)
        assert stock is not None
        descriptor = stock.memory.fileno()
        assert descriptor is not None
        for attempt in (
            lambda: os.pwrite(descriptor, b"x", 0),
            lambda: os.ftruncate(descriptor, 0),
            lambda: mmap.mmap(descriptor, 4096),
        ):
            with pytest.raises(OSError, match="not permitted"):
                attempt()
        stock.close()


def test_the_memory_is_given_back_when_the_last_loader_has_closed(
    disk: Place, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper, "GRACE_S", 0.05)
    monkeypatch.setattr(keeper, "_LOOK_S", 0.02)
    with kept(disk) as (_, thread, _):
        stock = taken_over(disk.paths[0], disk.settings)
        assert stock is not None
        assert bytes_ahead(loaded(disk, caplog))
        assert thread.is_alive()
        stock.close()
        thread.join(GENEROUS_S)
        assert not thread.is_alive()
    assert [name for name in opened() if "engine_loader-ahead" in name] == []


def test_it_is_given_back_when_nobody_comes(disk: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "IDLE_S", 0.05)
    monkeypatch.setattr(keeper, "_LOOK_S", 0.02)
    with kept(disk) as (_, thread, _):
        thread.join(GENEROUS_S)
        assert not thread.is_alive()


def opened() -> list[str]:
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{name}"))
        except OSError:
            continue
    return found


def test_a_file_that_cannot_be_read_is_left_to_the_loader(disk: Place) -> None:
    Path(disk.paths[1]).unlink()
    with kept(disk) as (_, _, told):
        assert told[0]["read"] == len(checkpoint(ENTRIES))
        assert "No such file or directory" in str(told[0]["reason"])


def answering(place: Place, answer: Callable[[socket.socket], object]) -> threading.Thread:
    """Somebody who takes the name of the process that reads ahead, and answers so to the next who comes."""
    listening = listen(place.paths[0], handing_over.server_of(place.paths[0], place.settings))
    assert listening is not None
    listening.setblocking(True)

    def serve() -> None:
        with listening, listening.accept()[0] as connection:
            answer(connection)

    thread = threading.Thread(target=serve)
    thread.start()
    return thread


def memory(nbytes: int, seals: int = SEALS) -> int:
    descriptor = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, nbytes)
    if seals:
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


def raw(index: object, descriptor: int) -> Callable[[socket.socket], None]:
    def send(connection: socket.socket) -> None:
        content = index if isinstance(index, bytes) else json.dumps(index).encode()
        socket.send_fds(connection, [len(content).to_bytes(8, "little")], [descriptor])
        connection.sendall(content)
        os.close(descriptor)

    return send


WRONG: dict[str, Callable[[], Callable[[socket.socket], object]]] = {
    "nothing": lambda: lambda connection: None,
    "half of a length": lambda: lambda connection: connection.sendall(b"abc"),
    "no descriptor": lambda: lambda connection: connection.sendall((2).to_bytes(8, "little") + b"{}"),
    "an index of terabytes": lambda: (
        lambda connection: socket.send_fds(connection, [(1 << 42).to_bytes(8, "little")], [0])
    ),
    "half of an index": lambda: lambda connection: socket.send_fds(connection, [(1 << 10).to_bytes(8, "little")], [0]),
    "no JSON": lambda: raw(b"\xff\xfe", memory(4096)),
    "a list": lambda: raw([], memory(4096)),
    "a part with four numbers": lambda: raw({"x": [[0, 1, 2, 3]]}, memory(4096)),
    "a part with words": lambda: raw({"x": [["0", "1", "2"]]}, memory(4096)),
    "a part outside of the memory": lambda: raw({"x": [[0, 4097, 0]]}, memory(4096)),
    "a part before the memory": lambda: raw({"x": [[0, 16, -16]]}, memory(4096)),
    "a part that ends before it begins": lambda: raw({"x": [[16, 0, 0]]}, memory(4096)),
    "memory that others may change": lambda: raw({"x": [[0, 16, 0]]}, memory(4096, seals=0)),
    "memory that may shrink": lambda: raw({"x": [[0, 16, 0]]}, memory(4096, fcntl.F_SEAL_GROW)),
    "no memory": lambda: raw({"x": [[0, 16, 0]]}, os.open("/dev/null", os.O_RDONLY)),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_no_stock_is_not_taken(disk: Place, what: str, caplog: pytest.LogCaptureFixture) -> None:
    before = len(opened())
    thread = answering(disk, WRONG[what]())
    assert bytes_ahead(loaded(disk, caplog)) == ""
    thread.join()
    assert len(opened()) == before


def test_who_does_not_answer_is_not_waited_for_long(
    disk: Place, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handing_over, "_WAIT_S", 0.05)
    done = threading.Event()
    thread = answering(disk, lambda connection: done.wait(GENEROUS_S))
    assert bytes_ahead(loaded(disk, caplog)) == ""
    done.set()
    thread.join()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_nobody_else_can_hand_over_or_take(disk: Place, caplog: pytest.LogCaptureFixture) -> None:
    name = name_of(disk.paths[0])
    with kept(disk):

        def take() -> bytes:
            with socket.socket(socket.AF_UNIX) as taking:
                taking.connect(name)
                return taking.recv(1)

        assert in_child(take, user=NOBODY) == b""
        assert bytes_ahead(loaded(disk, caplog))

    status = os.stat(disk.paths[0])
    identity = f"{status.st_dev}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}"
    ready, go = os.pipe(), os.pipe()

    def give() -> None:
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(name)
            listening.listen()
            os.write(ready[1], b".")
            with listening.accept()[0] as connection:
                descriptor = memory(MIB)
                whole = [StockedPart(0, MIB, 0)]
                with suppress(OSError):  # nobody takes it
                    hand_over(connection, descriptor, {identity: whole})
                os.read(go[0], 1)

    # The name is not protected: another user may have taken it.
    giving = threading.Thread(target=lambda: in_child(give, user=NOBODY))
    giving.start()
    os.read(ready[0], 1)
    assert bytes_ahead(loaded(disk, caplog)) == ""
    os.write(go[1], b".")
    giving.join()
    for descriptor in (*ready, *go):
        os.close(descriptor)


def test_a_process_of_its_own_does_it(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    told: list[WarmingAccount] = []
    asking = threading.Thread(
        target=stock_files, args=(place.paths, {}, place.settings, 64 * MIB, told.append), daemon=True
    )
    asking.start()
    wait_for(lambda: told, LAST_S)
    assert told == [WarmingAccount(read=SIZE)]
    stock = taken_over(place.paths[0], place.settings)
    assert stock is not None
    assert stock.size == SIZE
    assert bytes_ahead(loaded(place, caplog))
    (pid,) = keepers()
    assert os.getpriority(os.PRIO_PROCESS, pid) == 19
    assert "torch" not in Path(f"/proc/{pid}/maps").read_text()
    os.kill(pid, signal.SIGKILL)  # what it has handed over stays
    asking.join(GENEROUS_S)
    assert np.frombuffer(stock_bytes(stock.memory.fileno(), 16), np.uint8).size == 16
    stock.close()
    assert bytes_ahead(loaded(place, caplog)) == ""


def stock_bytes(descriptor: int | None, nbytes: int) -> bytes:
    assert descriptor is not None
    return os.pread(descriptor, nbytes, 0)


def keepers() -> list[int]:
    """The processes that this one has started to read ahead."""
    children = []
    for task in os.listdir("/proc/self/task"):
        with suppress(OSError):  # it has ended
            children += Path(f"/proc/self/task/{task}/children").read_text().split()
    return [int(pid) for pid in children if b"engine_loader.ahead" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def test_an_engine_that_starts_has_it_read_ahead(
    place: Place, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENGINE_LOADER_START__WARM", "auto")
    caplog.set_level(logging.INFO, log.name)
    model = place.paths[0].rpartition("/")[0]
    begin_to_warm(model, place.settings.model_copy(update={"weights_uri": model}), log)
    words = rf"start\.warm: {SIZE / MIB:.1f} MiB into memory in \d+\.\d s, until the loader takes them over"
    wait_for(lambda: re.search(words, caplog.text), LAST_S)
    assert bytes_ahead(loaded(place, caplog))
    for pid in keepers():
        os.kill(pid, signal.SIGTERM)
    wait_for(lambda: not [thread for thread in threading.enumerate() if thread.name == "engine-loader-warm"])


def test_the_command_keeps_it_until_it_is_interrupted(disk: Place, caplog: pytest.LogCaptureFixture) -> None:
    model = Path(disk.paths[0]).parent
    program = [sys.executable, "-m", "engine_loader", "warm", model.name]
    env = {**os.environ, "ENGINE_LOADER_LOADER__READ_MODE": "direct", "ENGINE_LOADER_REPORT__DIRECTORY": str(model)}
    with subprocess.Popen(program, env=env, cwd=model.parent, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        said = running.stdout.readline()
        assert said.startswith(f"{model.name}: {SIZE / MIB:.1f} MiB into memory in ")
        assert bytes_ahead(loaded(disk, caplog))
        running.send_signal(signal.SIGINT)
        assert running.wait(GENEROUS_S) == 130
    wait_for(lambda: name_of(disk.paths[0]).replace("\0", "@") not in Path("/proc/net/unix").read_text())


@pytest.mark.parametrize(
    ("account", "text"),
    [
        (WarmingAccount(read=2 * MIB), "2.00 MiB into memory in 15.0 s, until the loader takes them over"),
        (
            WarmingAccount(read=2 * MIB, reason=FULL),
            f"2.00 MiB into memory in 15.0 s, until the loader takes them over; {FULL}",
        ),
        (WarmingAccount(reason=NO_ROOM), f"nothing is read ahead: {NO_ROOM}"),
    ],
)
def test_what_became_of_it_is_said_in_words(account: WarmingAccount, text: str) -> None:
    assert stock_described(account, 15.0) == text
