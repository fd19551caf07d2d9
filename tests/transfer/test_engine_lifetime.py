"""Engines and transfers end when they are told to, and leave nothing behind."""

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
from engine_loader.transfer.native.engine import NativeEngine
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
def test_a_cancelled_transfer_writes_nothing_any_more(make_engine, file):
    engine = make_engine()
    target = Destination(1 << 20)
    transfer = start(engine, [file], endless(1 << 20), target)
    assert not transfer.wait(timeout_s=0.1)
    transfer.cancel()
    target.memory[:] = 7
    time.sleep(0.05)
    assert (target.memory == 7).all()
    with pytest.raises(TransferCancelled):
        transfer.wait()
    assert transfer.bytes_done < transfer.nbytes
    assert read(engine, [file], ALL, len(CONTENT)) == CONTENT


def test_a_transfer_can_be_cancelled_twice_and_when_it_is_complete(make_engine, file):
    engine = make_engine()
    target = Destination(len(CONTENT))
    transfer = start(engine, [file], ALL, target)
    assert transfer.wait()
    transfer.cancel()
    transfer.cancel()
    assert transfer.wait()
    assert bytes(target) == CONTENT


def test_a_transfer_that_waits_its_turn_can_be_cancelled(make_engine, file):
    engine = make_engine(threads=1)
    first = start(engine, [file], endless(1 << 20), Destination(1 << 20))
    second = start(engine, [file], ALL, Destination(len(CONTENT)))
    second.cancel()
    with pytest.raises(TransferCancelled):
        second.wait()
    third = start(engine, [file], ALL, Destination(len(CONTENT)))
    first.cancel()
    assert third.wait(timeout_s=GENEROUS_S)


def test_closing_an_engine_ends_waits_on_other_threads(make_engine, file):
    engine = make_engine()
    transfer = start(engine, [file], endless(1 << 20), Destination(1 << 20))
    told: list[Exception] = []

    def wait() -> None:
        try:
            transfer.wait()
        except TransferError as error:
            told.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    time.sleep(0.05)
    engine.close()
    waiting.join(GENEROUS_S)
    assert [type(error) for error in told] == [TransferCancelled]


def test_ctrl_c_while_an_engine_is_closed_leaves_no_thread(file, monkeypatch):
    """Also when somebody still holds the engine, as a session that was interrupted does."""
    before = open_resources()
    engine = NativeEngine(2)
    read(engine, [file], ALL, len(CONTENT))
    library, interrupts = engine._quick, [KeyboardInterrupt]

    class Interrupted:
        def __getattr__(self, name: str) -> object:
            return getattr(library, name)

        def el_engine_close(self, *arguments: object) -> object:
            if interrupts:
                raise interrupts.pop()
            return library.el_engine_close(*arguments)

    monkeypatch.setattr(engine, "_quick", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        engine.close()
    assert left_open(before, 10) == []


def test_a_closed_engine_takes_no_plan(make_engine, file):
    engine = make_engine()
    read(engine, [file], ALL, len(CONTENT))
    engine.close()
    engine.close()
    with pytest.raises(TransferError, match="the transfer engine is closed"):
        start(engine, [file], ALL, Destination(len(CONTENT)))
    assert engine.statistics().bytes_read == len(CONTENT)


def test_an_engine_that_never_read_can_be_closed(make_engine):
    before = open_resources()
    make_engine().close()
    assert left_open(before) == []


def test_many_rounds_leave_no_thread_and_no_descriptor(make_engine, file):
    engine = make_engine(threads=3)
    read(engine, [file], ALL, len(CONTENT))
    engine.close()
    gc.collect()
    before = open_resources()
    for number in range(15):
        engine = make_engine(threads=3)
        if number % 3:
            read(engine, [file], ALL, len(CONTENT))
        if number % 3 == 2:
            start(engine, [file], endless(1 << 20), Destination(1 << 20))
        engine.close()
    del engine
    gc.collect()
    assert left_open(before) == []


def gone(held: "weakref.ref[object]") -> bool:
    gc.collect()
    return held() is None


@pytest.mark.usefixtures("patience")
@pytest.mark.parametrize("ending", ["complete", "cancelled", "cancelled-before-its-turn", "failed", "closed"])
def test_the_destination_is_let_go_when_the_transfer_has_ended(make_engine, file, ending):
    engine = make_engine(threads=1)
    blocking = start(engine, [file], endless(1 << 20), Destination(1 << 20)) if "turn" in ending else None

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
    transfer = engine.submit([file], plan, owner=owner)
    del owner, plan
    assert held() is not None
    if ending == "complete":
        assert transfer.wait()
    elif ending == "failed":
        with pytest.raises(TransferError):
            transfer.wait()
    elif ending == "closed":
        engine.close()
    else:
        transfer.cancel()
    wait_for(lambda: gone(held))
    if blocking is not None:
        blocking.cancel()
    assert memory.size


def test_a_destination_of_a_read_that_hangs_is_kept_until_it_comes_back(python_engine):
    stuck = Stuck()
    hanging = FakeFile(CONTENT)
    hanging.behave = stuck

    class Owner:
        pass

    owner, memory = Owner(), np.zeros(len(CONTENT), np.uint8)
    held = weakref.ref(owner)
    engine = python_engine(threads=1)
    transfer = engine.submit([hanging], make_extents([extent(0, 0, 1000, memory.ctypes.data)]), owner=owner)
    del owner
    try:
        wait_for(lambda: stuck.reads)
        transfer.cancel()
        engine.close()
        assert stuck.reads == 1
        del transfer, engine
        gc.collect()
        assert held() is not None
    finally:
        stuck.release()
    wait_for(lambda: gone(held))


def test_a_child_process_is_told_that_engines_do_not_survive_a_fork(make_engine, file):
    engine = make_engine()
    transfer = start(engine, [file], endless(1 << 20), Destination(1 << 20))

    def messages() -> list[str]:
        found = []
        for use in (transfer.wait, lambda: start(engine, [file], ALL, Destination(len(CONTENT)))):
            try:
                use()
            except TransferError as error:
                found.append(str(error))
        transfer.cancel()
        engine.close()
        return found

    told = in_child(messages)
    assert told == ["the transfer engine does not survive a fork (open the checkpoint again here)"] * 2
    transfer.cancel()
    assert read(engine, [file], ALL, len(CONTENT)) == CONTENT


INTERRUPTED = """
import sys
sys.path.insert(0, {root!r})
from tests.transfer.conftest import ENGINES, Destination, endless, start
from tests.support.sources import FakeFile
from engine_loader.sources.posix import PosixSource
engine = ENGINES[sys.argv[1]](threads=2)
if sys.argv[3] == "hangs":
    import threading
    file = FakeFile(bytes(1 << 20))
    file.behave = lambda offset, wanted: threading.Event().wait() or wanted
else:
    file = PosixSource().open(sys.argv[2])
transfer = start(engine, [file], endless(1 << 20), Destination(1 << 20))
try:
    print("reading", flush=True)
    transfer.wait()
except KeyboardInterrupt:
    transfer.cancel()
    engine.close()
    print("interrupted", flush=True)
"""


@pytest.mark.parametrize(
    ("engine", "how"), [("python", "reads"), ("native", "reads"), ("native-direct", "reads"), ("python", "hangs")]
)
def test_ctrl_c_ends_a_wait(file, engine, how):
    """The transfer itself would go on for a minute, or for ever."""
    root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    arguments = [sys.executable, "-c", INTERRUPTED.format(root=root), engine, file.path, how]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout.readline() == "reading\n"
            time.sleep(0.1)
            child.send_signal(signal.SIGINT)
            assert child.stdout.readline() == "interrupted\n"
            assert child.wait(GENEROUS_S) == 0
        finally:
            child.kill()
