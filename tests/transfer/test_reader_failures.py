"""What goes wrong below reader threads: tried again where that can help, else one error with file, offset and cause."""

import errno
import itertools
import os
import threading
import time

import pytest

from engine_loader.errors import CheckpointError, TransferCancelled, TransferError
from engine_loader.sources.posix import PosixFile
from engine_loader.transfer.plan import extent
from engine_loader.transfer.protocol import Transfer
from tests.support.checkpoints import noise
from tests.support.sources import FakeFile, Stuck
from tests.support.waiting import wait_for
from tests.transfer.conftest import Destination, read, start

CONTENT = noise(100_000, 3)
BLOCK_BYTES = 4096


class Failing:
    """Behaviour of a FakeFile: fails so many times in turn at every offset, then gives what is wanted."""

    def __init__(self, code: int, times: int) -> None:
        self._code = code
        self._times = times
        self._failed: dict[int, int] = {}
        self._lock = threading.Lock()

    def __call__(self, offset: int, wanted: int) -> int:
        with self._lock:
            self._failed[offset] = self._failed.get(offset, 0) + 1
            if self._failed[offset] <= self._times:
                raise OSError(self._code, os.strerror(self._code))
        return wanted


def fake(behave) -> FakeFile:
    file = FakeFile(CONTENT, "/mnt/model.safetensors")
    file.behave = behave
    return file


ALL = [extent(0, 0, len(CONTENT), 0)]


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR, errno.EREMOTEIO])
def test_errors_that_may_pass_are_tried_again(python_readers, code):
    readers = python_readers(block_bytes=50_000, retry_delay_s=0.001)
    assert read(readers, [fake(Failing(code, 4))], ALL, len(CONTENT)) == CONTENT
    assert readers.statistics().retries == 8


def test_the_first_read_that_is_tried_again_is_said_and_no_other(python_readers, caplog):
    readers = python_readers(threads=1, block_bytes=50_000, retry_delay_s=0.001)
    assert read(readers, [fake(Failing(errno.EIO, 2))], ALL, len(CONTENT)) == CONTENT
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.message == (
        "/mnt/model.safetensors: a read at byte 0 failed with EIO and is tried again; others may follow"
    )
    assert readers.statistics().first_retry == "/mnt/model.safetensors (EIO)"


def test_a_file_that_is_much_slower_than_others_is_named(python_readers):
    readers = python_readers(threads=1)
    content = bytes(4 << 20)
    files = [FakeFile(content, f"/mnt/{number}.safetensors") for number in range(4)]
    files[1].behave = lambda offset, wanted: time.sleep(0.2) or wanted
    for file in files:
        read(readers, [file], [extent(0, 0, len(content), 0)], len(content))
    assert readers.statistics().slowest_file.startswith("/mnt/1.safetensors (")


def test_an_error_that_stays_is_reported_once_with_all_that_is_known(python_readers):
    readers = python_readers(block_bytes=BLOCK_BYTES, retry_delay_s=0.001, max_tries=3)
    file = fake(lambda offset, wanted: wanted)
    file.behave = Failing(errno.EIO, 10**9)
    with pytest.raises(TransferError) as caught:
        read(readers, [file], [extent(0, 8192, 4096, 0)], 4096)
    assert str(caught.value) == (
        "/mnt/model.safetensors: at byte 8192: could not read: Input/output error [EIO] after 3 tries "
        "(the storage reports an error: look at the kernel log, the disk's health or the mount)"
    )
    assert caught.value.errno == errno.EIO
    assert isinstance(caught.value.__cause__, OSError)
    assert len(file.reads) == 0


@pytest.mark.parametrize("code", [errno.EACCES, errno.EBADF, errno.EINVAL, errno.ENODEV])
def test_other_errors_are_not_tried_again(python_readers, code):
    readers = python_readers(threads=1)
    with pytest.raises(TransferError, match=rf"could not read: .*\[{errno.errorcode[code]}\]") as caught:
        read(readers, [fake(Failing(code, 1))], ALL, len(CONTENT))
    assert "tries" not in str(caught.value)
    assert readers.statistics().retries == 0


def test_the_pause_between_tries_grows(python_readers):
    moments: list[float] = []

    def behave(offset: int, wanted: int) -> int:
        moments.append(time.monotonic())
        raise OSError(errno.EIO, "I/O error")

    with pytest.raises(TransferError):
        read(python_readers(threads=1, retry_delay_s=0.05, max_tries=4), [fake(behave)], ALL, len(CONTENT))
    pauses = [later - earlier for earlier, later in itertools.pairwise(moments)]
    assert len(pauses) == 3
    assert all(pause >= 0.9 * 0.05 * 2**number for number, pause in enumerate(pauses))


def test_tries_are_counted_anew_after_every_byte_that_comes(python_readers):
    turns: dict[int, int] = {}

    def behave(offset: int, wanted: int) -> int:
        turns[offset] = turns.get(offset, 0) + 1
        if turns[offset] < 3:
            raise OSError(errno.EIO, "I/O error")
        return min(wanted, 10_000)

    readers = python_readers(threads=1, retry_delay_s=0.001, max_tries=3)
    assert read(readers, [fake(behave)], ALL, len(CONTENT)) == CONTENT


@pytest.mark.parametrize("most", [1, 7, 1000, 4097])
def test_short_reads_are_resumed(python_readers, most):
    readers = python_readers(block_bytes=20_000)
    rows = [extent(0, 0, 5000, 0), extent(0, 5000, 5000, 5000), (0, 10, 20_000, 100, 200, 10_000, 100)]
    file = fake(lambda offset, wanted: min(most, wanted))
    got = read(readers, [file], rows, 11_000)
    assert got[:10_000] == CONTENT[:10_000]
    assert got[10_000:] == b"".join(CONTENT[20_000 + n * 200 : 20_100 + n * 200] for n in range(10))
    assert readers.statistics().short_reads > 0


def test_a_file_that_ends_early_is_no_endless_loop(python_readers):
    file = FakeFile(CONTENT[:70_000], "/mnt/model.safetensors", size=len(CONTENT))
    with pytest.raises(TransferError) as caught:
        read(python_readers(block_bytes=BLOCK_BYTES), [file], ALL, len(CONTENT))
    assert str(caught.value).startswith("/mnt/model.safetensors: at byte ")
    assert 70_000 <= caught.value.offset < len(CONTENT)
    assert "the file ended here while it was being read; it had 100000 bytes" in str(caught.value)
    assert "copy it again" in caught.value.hint


def test_what_a_source_raises_beside_io_errors_reaches_the_waiter(python_readers):
    def behave(offset: int, wanted: int) -> int:
        raise RuntimeError("the token has expired")

    with pytest.raises(TransferError, match=r"could not read: RuntimeError.*the token has expired"):
        read(python_readers(), [fake(behave)], ALL, len(CONTENT))

    def refuse(offset: int, wanted: int) -> int:
        raise CheckpointError("the bucket is gone", file="s3://bucket/model", hint="ask its owner")

    with pytest.raises(CheckpointError, match=r"^s3://bucket/model: the bucket is gone \(ask its owner\)$"):
        read(python_readers(), [fake(refuse)], ALL, len(CONTENT))


def test_the_threads_survive_every_failure(python_readers):
    readers = python_readers(threads=2, retry_delay_s=0.001, max_tries=2)
    for _ in range(5):
        with pytest.raises(TransferError):
            read(readers, [fake(Failing(errno.EIO, 10**9))], ALL, len(CONTENT))
    assert read(readers, [fake(lambda offset, wanted: wanted)], ALL, len(CONTENT)) == CONTENT


def test_one_failure_does_not_touch_other_transfers(python_readers):
    readers = python_readers(threads=2, block_bytes=BLOCK_BYTES, retry_delay_s=0.001)
    good, bad = Destination(len(CONTENT)), Destination(len(CONTENT))
    failing = start(readers, [fake(Failing(errno.EACCES, 10**9))], ALL, bad)
    working = start(readers, [fake(lambda offset, wanted: wanted)], ALL, good)
    assert working.wait()
    assert bytes(good) == CONTENT
    for _ in range(2):
        with pytest.raises(TransferError, match="EACCES"):
            failing.wait()


def test_extents_that_are_complete_stay_so_when_the_transfer_fails(python_readers):
    def behave(offset: int, wanted: int) -> int:
        if offset >= 50_000:
            raise OSError(errno.EACCES, "Permission denied")
        return wanted

    readers = python_readers(threads=1, block_bytes=10_000)
    target = Destination(len(CONTENT))
    transfer = start(readers, [fake(behave)], [extent(0, n * 10_000, 10_000, n * 10_000) for n in range(10)], target)
    with pytest.raises(TransferError):
        transfer.wait()
    assert all(transfer.wait(number) for number in range(5))
    assert bytes(target)[:50_000] == CONTENT[:50_000]
    with pytest.raises(TransferError):
        transfer.wait(7)


@pytest.fixture
def stuck():
    """Behaviour of a read that hangs until the end of the test."""
    behave = Stuck()
    yield behave
    behave.release()


def test_a_read_that_hangs_is_an_error_after_the_deadline(python_readers, stuck):
    readers = python_readers(deadline_s=0.5)

    def behave(offset: int, wanted: int) -> int:
        return stuck(offset, wanted) if offset == 65536 else wanted

    readers.block_bytes = 65536
    began = time.monotonic()
    with pytest.raises(TransferError) as caught:
        read(readers, [fake(behave)], ALL, len(CONTENT))
    assert time.monotonic() - began >= 0.5
    assert stuck.reads == 1
    assert str(caught.value).startswith("/mnt/model.safetensors: at byte 65536: no byte came for 0.5 s")
    assert "look at the mount and the network" in caught.value.hint
    assert caught.value.errno == errno.ETIMEDOUT


def test_a_hanging_read_is_noticed_though_others_go_on(python_readers, stuck):
    def behave(offset: int, wanted: int) -> int:
        time.sleep(0.01)
        return stuck(offset, wanted) if offset == 0 else wanted

    readers = python_readers(deadline_s=0.3, block_bytes=1000)
    others = [extent(0, 1000, 1000, 0)] * 100_000  # for a quarter of an hour
    with pytest.raises(TransferError, match="at byte 0: no byte came"):
        read(readers, [fake(behave)], [extent(0, 0, 1000, 0), *others], 1000)
    assert stuck.reads == 1


def test_a_transfer_behind_one_that_hangs_does_not_wait_for_ever(python_readers, stuck):
    readers = python_readers(threads=1, deadline_s=0.3)
    start(readers, [fake(stuck)], ALL, Destination(len(CONTENT)))
    with pytest.raises(TransferError, match=r"no byte came for 0\.3 s"):
        read(readers, [fake(lambda offset, wanted: wanted)], ALL, len(CONTENT))
    assert stuck.reads == 1


class SlowTime:
    """The clock of reader threads, and reads that take a tenth of a second by it, whatever else the machine does.

    ``wait`` looks whether a deadline has passed at least once in every read.
    """

    perf_counter = staticmethod(time.perf_counter)

    def __init__(self) -> None:
        self._now = 1000.0
        self._looks = 0

    def monotonic(self) -> float:
        return self._now

    def __call__(self, offset: int, wanted: int) -> int:
        self._now += 0.1
        before = self._looks
        wait_for(lambda: self._looks >= before + 2)  # the first one may have begun before
        return min(wanted, 10_000)

    def wait(self, transfer: Transfer) -> None:
        while not transfer.wait(timeout_s=0):
            self._looks += 1


@pytest.fixture
def slow_time(monkeypatch):
    clock = SlowTime()
    for module in ("python_readers", "python_transfer"):
        monkeypatch.setattr(f"engine_loader.transfer.python.{module}.time", clock)
    return clock


def test_a_slow_source_is_no_hanging_one(python_readers, slow_time):
    target = Destination(len(CONTENT))
    slow_time.wait(start(python_readers(threads=1, deadline_s=0.3), [fake(slow_time)], ALL, target))
    assert bytes(target) == CONTENT


def test_a_transfer_behind_a_long_one_is_no_hanging_one(python_readers, slow_time):
    readers = python_readers(threads=1, deadline_s=0.3, block_bytes=5000)
    start(readers, [fake(slow_time)], ALL, Destination(len(CONTENT)))
    target = Destination(10)
    slow_time.wait(start(readers, [fake(slow_time)], [extent(0, 0, 10, 0)], target))
    assert bytes(target) == CONTENT[:10]


def test_a_wait_can_end_before_the_transfer_does(python_readers, stuck):
    transfer = start(python_readers(), [fake(stuck)], ALL, Destination(len(CONTENT)))
    assert transfer.wait(timeout_s=0.1) is False
    assert transfer.wait(0, timeout_s=0) is False
    assert transfer.bytes_done == 0


def test_a_failure_is_reported_only_when_nothing_will_be_written_any_more(python_readers, stuck):
    """Else a fallback that reads the same tensors would have its bytes overwritten."""

    def behave(offset: int, wanted: int) -> int:
        if offset == 0:
            return stuck(offset, wanted)
        wait_for(lambda: stuck.reads)
        raise OSError(errno.EACCES, "Permission denied")

    readers = python_readers(threads=2, block_bytes=50_000)
    transfer = start(readers, [fake(behave)], ALL, Destination(len(CONTENT)))
    assert transfer.wait(timeout_s=0.5) is False
    stuck.release()
    with pytest.raises(TransferError, match="EACCES"):
        transfer.wait()


# The same from the kernel, for every kind of reader threads.


def test_a_real_file_that_was_cut_short(make_readers, opened):
    file = opened(CONTENT)
    os.truncate(file.path, 50_000)
    with pytest.raises(TransferError) as caught:
        read(make_readers(block_bytes=BLOCK_BYTES), [file], ALL, len(CONTENT))
    assert caught.value.file == file.path
    assert 50_000 <= caught.value.offset <= len(CONTENT)
    assert "the file ended here while it was being read; it had 100000 bytes when it was opened" in str(caught.value)


def test_a_real_io_error(make_readers):
    """The memory of a process reads like a file, and where nothing is mapped, like a bad disk."""
    descriptor = os.open("/proc/self/mem", os.O_RDONLY)
    file = PosixFile("/proc/self/mem", descriptor, os.fstat(descriptor))
    file.size = 1 << 20
    try:
        with pytest.raises(TransferError) as caught:
            read(make_readers(retry_delay_s=0.001, max_tries=3), [file], [extent(0, 4096, 8192, 0)], 8192)
    finally:
        file.close()
    assert str(caught.value).startswith(
        "/proc/self/mem: at byte 4096: could not read: Input/output error [EIO] after 3 tries (the storage reports"
    )
    assert caught.value.errno == errno.EIO


def test_a_descriptor_of_a_directory(make_readers, tmp_path):
    descriptor = os.open(tmp_path, os.O_RDONLY)
    file = PosixFile.__new__(PosixFile)
    file.path, file.size = str(tmp_path), 4096
    file.fileno = lambda: descriptor  # type: ignore[method-assign]
    file.read_into = lambda offset, buffers: os.preadv(descriptor, buffers, offset)  # type: ignore[method-assign]
    try:
        with pytest.raises(TransferError, match=r"could not read: Is a directory \[EISDIR\] \(this is a directory"):
            read(make_readers(), [file], [extent(0, 0, 4096, 0)], 4096)
    finally:
        os.close(descriptor)


def test_cancelled_is_an_error_of_its_own(make_readers, opened):
    readers = make_readers()
    transfer = start(readers, [opened(CONTENT)], ALL * 20_000, Destination(len(CONTENT)))
    readers.close()
    with pytest.raises(TransferCancelled):
        transfer.wait()
