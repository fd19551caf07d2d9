"""Reader threads and transfers end when they are asked to, and leave nothing behind."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref

import numpy as np
import pytest

from engine_loader.errors import TransferCancelled, TransferError
from engine_loader.transfer.native.native_readers import NativeReaders
from engine_loader.transfer.plan import extent, make_extents
from tests.support.checkpoints import noise
from tests.support.children import in_child
from tests.support.resources import left_open, open_resources
from tests.support.sources import FakeFile, Stuck
from tests.support.waiting import GENEROUS_S, wait_for
from tests.transfer.conftest import Destination, endless, read, start

CONTENT = noise(1 << 20, 4)
ALL = [extent(0, 0, len(CONTENT), 0)]


@pytest.fixture
def file(opened):
    return opened(CONTENT)


@pytest.mark.usefixtures("patience")
def test_a_cancelled_transfer_writes_nothing_any_more(make_readers, file):
    readers = make_readers()
    target = Destination(1 << 20)
    transfer = start(readers, [file], endless(1 << 20), target)
    assert not transfer.wait(timeout_s=0.1)
    transfer.cancel()
    target.memory[:] = 7
    time.sleep(0.05)
    assert (target.memory == 7).all()
    with pytest.raises(TransferCancelled):
        transfer.wait()
    assert transfer.bytes_done < transfer.nbytes
    assert read(readers, [file], ALL, len(CONTENT)) == CONTENT


def test_a_transfer_can_be_cancelled_twice_and_when_it_is_complete(make_readers, file):
    readers = make_readers()
    target = Destination(len(CONTENT))
    transfer = start(readers, [file], ALL, target)
    assert transfer.wait()
    transfer.cancel()
    transfer.cancel()
    assert transfer.wait()
    assert bytes(target) == CONTENT


def test_a_transfer_that_waits_its_turn_can_be_cancelled(make_readers, file):
    readers = make_readers(threads=1)
    first = start(readers, [file], endless(1 << 20), Destination(1 << 20))
    second = start(readers, [file], ALL, Destination(len(CONTENT)))
    second.cancel()
    with pytest.raises(TransferCancelled):
        second.wait()
    third = start(readers, [file], ALL, Destination(len(CONTENT)))
    first.cancel()
    assert third.wait(timeout_s=GENEROUS_S)


def test_closing_reader_threads_ends_waits_on_other_threads(make_readers, file):
    readers = make_readers()
    transfer = start(readers, [file], endless(1 << 20), Destination(1 << 20))
    raised: list[Exception] = []

    def wait() -> None:
        try:
            transfer.wait()
        except TransferError as error:
            raised.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    time.sleep(0.05)
    readers.close()
    waiting.join(GENEROUS_S)
    assert [type(error) for error in raised] == [TransferCancelled]


def test_ctrl_c_while_reader_threads_is_closed_leaves_no_thread(file, monkeypatch):
    """Also when something still holds the reader threads, as a session that was interrupted does."""
    before = open_resources()
    readers = NativeReaders(2)
    read(readers, [file], ALL, len(CONTENT))
    library, interrupts = readers._quick, [KeyboardInterrupt]

    class Interrupted:
        def __getattr__(self, name: str) -> object:
            return getattr(library, name)

        def el_readers_close(self, *arguments: object) -> object:
            if interrupts:
                raise interrupts.pop()
            return library.el_readers_close(*arguments)

    monkeypatch.setattr(readers, "_quick", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        readers.close()
    assert left_open(before, 10) == []


def test_a_closed_reader_threads_takes_no_plan(make_readers, file):
    readers = make_readers()
    read(readers, [file], ALL, len(CONTENT))
    readers.close()
    readers.close()
    with pytest.raises(TransferError, match="the reader threads are closed"):
        start(readers, [file], ALL, Destination(len(CONTENT)))
    assert readers.statistics().bytes_read == len(CONTENT)


def test_an_reader_threads_that_never_read_can_be_closed(make_readers):
    before = open_resources()
    make_readers().close()
    assert left_open(before) == []


def test_many_rounds_leave_no_thread_and_no_descriptor(make_readers, file):
    readers = make_readers(threads=3)
    read(readers, [file], ALL, len(CONTENT))
    readers.close()
    gc.collect()
    before = open_resources()
    for number in range(15):
        readers = make_readers(threads=3)
        if number % 3:
            read(readers, [file], ALL, len(CONTENT))
        if number % 3 == 2:
            start(readers, [file], endless(1 << 20), Destination(1 << 20))
        readers.close()
    del readers
    gc.collect()
    assert left_open(before) == []


def gone(held: "weakref.ref[object]") -> bool:
    gc.collect()
    return held() is None


@pytest.mark.usefixtures("patience")
@pytest.mark.parametrize("ending", ["complete", "cancelled", "cancelled-before-its-turn", "failed", "closed"])
def test_the_destination_is_let_go_when_the_transfer_has_ended(make_readers, file, ending):
    readers = make_readers(threads=1)
    blocking = start(readers, [file], endless(1 << 20), Destination(1 << 20)) if "turn" in ending else None

    class Owner:
        pass

    owner, memory = Owner(), np.zeros(1 << 20, np.uint8)
    held = weakref.ref(owner)
    rows = ALL if ending == "complete" else endless(1 << 20)
    if ending == "failed":
        os.truncate(file.path, 1000)
        rows = ALL
    plan = rows if isinstance(rows, np.ndarray) else make_extents(rows)
    plan["address"] = memory.ctypes.data
    transfer = readers.submit([file], plan, owner=owner)
    del owner, plan
    assert held() is not None
    if ending == "complete":
        assert transfer.wait()
    elif ending == "failed":
        with pytest.raises(TransferError):
            transfer.wait()
    elif ending == "closed":
        readers.close()
    else:
        transfer.cancel()
    wait_for(lambda: gone(held))
    if blocking is not None:
        blocking.cancel()
    assert memory.size


def test_a_destination_of_a_read_that_hangs_is_kept_until_it_comes_back(python_readers):
    stuck = Stuck()
    hanging = FakeFile(CONTENT)
    hanging.behave = stuck

    class Owner:
        pass

    owner, memory = Owner(), np.zeros(len(CONTENT), np.uint8)
    held = weakref.ref(owner)
    readers = python_readers(threads=1)
    transfer = readers.submit([hanging], make_extents([extent(0, 0, 1000, memory.ctypes.data)]), owner=owner)
    del owner
    try:
        wait_for(lambda: stuck.reads)
        transfer.cancel()
        readers.close()
        assert stuck.reads == 1
        del transfer, readers
        gc.collect()
        assert held() is not None
    finally:
        stuck.release()
    wait_for(lambda: gone(held))


def test_a_child_process_is_reported_that_reader_threads_do_not_survive_a_fork(make_readers, file):
    readers = make_readers()
    transfer = start(readers, [file], endless(1 << 20), Destination(1 << 20))

    def messages() -> list[str]:
        found = []
        for use in (transfer.wait, lambda: start(readers, [file], ALL, Destination(len(CONTENT)))):
            try:
                use()
            except TransferError as error:
                found.append(str(error))
        transfer.cancel()
        readers.close()
        return found

    reported = in_child(messages)
    assert reported == ["reader threads do not survive a fork (open the checkpoint again here)"] * 2
    transfer.cancel()
    assert read(readers, [file], ALL, len(CONTENT)) == CONTENT


INTERRUPTED = """
import sys
sys.path.insert(0, {root!r})
from tests.transfer.conftest import READERS, Destination, endless, start
from tests.support.sources import FakeFile
from engine_loader.sources.posix import PosixSource
readers = READERS[sys.argv[1]](threads=2)
if sys.argv[3] == "hangs":
    import threading
    file = FakeFile(bytes(1 << 20))
    file.behave = lambda offset, wanted: threading.Event().wait() or wanted
else:
    file = PosixSource().open(sys.argv[2])
transfer = start(readers, [file], endless(1 << 20), Destination(1 << 20))
try:
    print("reading", flush=True)
    transfer.wait()
except KeyboardInterrupt:
    transfer.cancel()
    readers.close()
    print("interrupted", flush=True)
"""


@pytest.mark.parametrize(
    ("readers", "how"), [("python", "reads"), ("native", "reads"), ("native-direct", "reads"), ("python", "hangs")]
)
def test_ctrl_c_ends_a_wait(file, readers, how):
    """The transfer itself would go on for a minute, or for ever."""
    root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    arguments = [sys.executable, "-c", INTERRUPTED.format(root=root), readers, file.path, how]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout.readline() == "reading\n"
            time.sleep(0.1)
            child.send_signal(signal.SIGINT)
            assert child.stdout.readline() == "interrupted\n"
            assert child.wait(GENEROUS_S) == 0
        finally:
            child.kill()
