"""What happens when reads fail: each function is run in a process of its own that has the fault shim preloaded.

LD_PRELOAD=faults.so ENGINE_LOADER_FAULTS=FILE python -m tests.transfer.native.scenarios NAME FOLDER
"""

from __future__ import annotations

import contextlib
import errno
import gc
import logging
import mmap
import os
import random
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from engine_loader.errors import TransferCancelled, TransferError
from engine_loader.sources.posix import PosixFile, PosixSource
from engine_loader.transfer.native import native_readers
from engine_loader.transfer.native import transfer as native_transfer
from engine_loader.transfer.native.library import Config
from engine_loader.transfer.native.native_readers import NativeReaders, NativeTransfer
from engine_loader.transfer.plan import extent, make_extents
from tests.support.resources import left_open, open_resources
from tests.support.waiting import any_try, wait_for

_WORDS = (
    *("error_every", "error", "short_every", "stall_every", "stall_ms", "direct_error"),
    *("delay_us", "one_by_one", "huge_us", "small_us"),
)
_COUNTS = ("calls", "stalled", "flying", "most_flying", "huge_made", "small_made")
_FIELDS = (*_WORDS, *_COUNTS)
FAULTS_BYTES = 4 * len(_FIELDS)
LONG_MS = 3_600_000


class Faults:
    """The shim's words; see shim/faults.c."""

    def __init__(self) -> None:
        with open(os.environ["ENGINE_LOADER_FAULTS"], "r+b") as file:
            self._memory = mmap.mmap(file.fileno(), FAULTS_BYTES)

    def set(self, **words: int) -> None:
        """Set these, and the others to 0."""
        for name in _WORDS:
            struct.pack_into("=I", self._memory, 4 * _FIELDS.index(name), words.get(name, 0))

    def get(self, name: str) -> int:
        return int(struct.unpack_from("=I", self._memory, 4 * _FIELDS.index(name))[0])

    def wait_for_stall(self) -> None:
        wait_for(lambda: self.get("stalled") > 0)

    def assert_stuck(self) -> None:
        """Whatever has just returned did so though a read still hangs."""
        assert self.get("stalled") > 0


class Patient(Config):
    """A configuration of reader threads whose pauses between tries may be as long as one likes."""

    def __init__(self, **words: object) -> None:
        super().__init__(**words, retry_cap_ms=LONG_MS)


class Owner:
    """Memory that counts how many of its kind there are."""

    alive = 0

    def __init__(self, nbytes: int) -> None:
        Owner.alive += 1
        self.memory = np.full(nbytes, 0xA5, np.uint8)

    def __del__(self) -> None:
        Owner.alive -= 1


def errors_pass(faults: Faults, file: PosixFile) -> None:
    faults.set(error_every=2, error=errno.EIO)
    with _readers() as readers:
        with _logged() as lines:
            _assert_arrives(readers, file)
            _assert_arrives(readers, file)
        account = readers.statistics()
        assert account.retries > 1 and account.first_retry == f"{file.path} (EIO)"
        assert len(lines) == 1 and "failed with EIO and is tried again" in lines[0]


def errors_stay(faults: Faults, file: PosixFile) -> None:
    for code in (errno.EIO, errno.ESTALE, errno.EINTR, errno.EAGAIN, errno.EREMOTEIO):
        faults.set(error_every=1, error=code)
        with _readers(max_tries=3) as readers:
            error = _failure(_submit(readers, file))
            assert error.errno == code and error.file == file.path and error.offset is not None
            assert "after 3 tries" in str(error)
    faults.set(error_every=1, error=errno.EACCES)
    with _readers() as readers:
        error = _failure(_submit(readers, file))
        assert error.errno == errno.EACCES and "no permission" in str(error)
        assert readers.statistics().retries == 0


def a_slow_file_is_named(faults: Faults, file: PosixFile) -> None:
    copies = [Path(f"{file.path}-{number}") for number in range(4)]
    for copy in copies:
        copy.write_bytes(Path(file.path).read_bytes())
    to = np.zeros(file.size, np.uint8)
    plan = np.repeat(make_extents([extent(0, 0, file.size, to.ctypes.data)]), 12)
    with _readers(read_mode="buffered") as readers:
        for copy in copies:
            faults.set(delay_us=20_000 if copy == copies[2] else 0)
            with contextlib.closing(PosixSource().open(str(copy))) as opened:
                readers.submit([opened], plan, owner=to).wait()
        assert readers.statistics().slowest_file.startswith(f"{copies[2]} (")


def short_reads_are_resumed(faults: Faults, file: PosixFile) -> None:
    for mode in ("buffered", "direct"):
        faults.set(short_every=2)
        with _readers(read_mode=mode) as readers:
            _assert_arrives(readers, file)
            assert readers.statistics().short_reads > 0


def direct_reads_may_be_refused(faults: Faults, file: PosixFile) -> None:
    faults.set(direct_error=errno.EINVAL)
    with _readers(read_mode="direct") as readers:
        _assert_arrives(readers, file)
        assert readers.statistics().modes == {"buffered": file.size}


def a_wait_can_time_out(faults: Faults, file: PosixFile) -> None:
    faults.set(stall_every=1, stall_ms=LONG_MS)
    with _readers() as readers:
        transfer = _submit(readers, file)
        assert not transfer.wait(timeout_s=0)
        faults.wait_for_stall()
        with _lasts_at_least(0.2):
            assert not transfer.wait(0, timeout_s=0.25)
        faults.assert_stuck()
        faults.set()
        assert transfer.wait()


@any_try(5)
def more_reads_at_once_where_they_bring_more(faults: Faults, file: PosixFile) -> None:
    """Each read takes 20 ms, however many there are: 8 threads go up to 64."""
    faults.set(delay_us=20_000)
    with contextlib.closing(NativeReaders(block_bytes=8 << 10, read_mode="direct")) as readers:
        _assert_often(readers, file, times=20)
        assert readers.counters()["threads"] == 64
    assert faults.get("most_flying") > 32


@any_try(5)
def no_more_reads_at_once_where_they_bring_nothing(faults: Faults, file: PosixFile) -> None:
    """Reads take their 2 ms one after the other: a trial with twice 8 threads brings nothing, and nothing beyond it."""
    faults.set(delay_us=2_000, one_by_one=1)
    with contextlib.closing(NativeReaders(block_bytes=8 << 10, read_mode="direct")) as readers:
        _assert_often(readers, file, times=5)
        assert readers.counters()["threads"] == 16


def threads_that_are_set_stay(faults: Faults, file: PosixFile) -> None:
    faults.set(delay_us=5_000)
    with _readers(3, block_bytes=8 << 10, read_mode="direct") as readers:
        _assert_often(readers, file, times=5)
        assert readers.counters()["threads"] == 3
    assert faults.get("most_flying") == 3


def threads_above_the_limit_do_not_hide_a_stuck_read(faults: Faults, file: PosixFile) -> None:
    faults.set(delay_us=2_000, one_by_one=1)
    with contextlib.closing(NativeReaders(block_bytes=8 << 10, read_mode="direct", deadline_s=2.0)) as readers:
        _assert_often(readers, file, times=5)
        faults.set(stall_every=1, stall_ms=LONG_MS)
        for transfer in [_submit(readers, file) for _ in range(4)]:  # also those that no thread ever got to
            assert _failure(transfer).errno == errno.ETIMEDOUT
        faults.assert_stuck()
        faults.set()


def huge_pages_that_take_long_give_way_to_small_ones(faults: Faults, file: PosixFile) -> None:
    huge, small = _pages_made(faults, file, huge_us=12_000, small_us=500)
    assert huge <= 8 and small >= 50  # one shows what they cost, on each of two threads


def huge_pages_that_are_quick_stay(faults: Faults, file: PosixFile) -> None:
    huge, small = _pages_made(faults, file, huge_us=1, small_us=5_000)
    assert huge >= 30 and small == 0


def huge_pages_are_tried_again(faults: Faults, file: PosixFile) -> None:
    slow = _pages_made(faults, file, huge_us=12_000, small_us=500)
    _pages_made(faults, file, huge_us=1, small_us=500)
    huge, small = _pages_made(faults, file, huge_us=1, small_us=500)
    assert slow[1] >= 50 and huge >= 30 and small == 0


def _pages_made(faults: Faults, file: PosixFile, *, huge_us: int, small_us: int) -> tuple[int, int]:
    """(calls for huge pages, calls for small ones) that it took to fill 128 MiB of fresh memory."""
    before = faults.get("huge_made"), faults.get("small_made")
    faults.set(huge_us=huge_us, small_us=small_us)
    step = file.size
    places = range(0, (128 << 20) - step, step)
    with mmap.mmap(-1, 128 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as area:
        to = np.frombuffer(area, np.uint8)
        plan = make_extents([extent(0, 0, step, to.ctypes.data + place) for place in places])
        with _readers(read_mode="buffered", block_bytes=4 << 20) as readers:
            readers.submit([file], plan).wait()
        data = Path(file.path).read_bytes()
        assert all(to[place : place + step].tobytes() == data for place in places)
        del to
    faults.set()
    return faults.get("huge_made") - before[0], faults.get("small_made") - before[1]


def cancel_ends_a_pause(faults: Faults, file: PosixFile) -> None:
    faults.set(error_every=1, error=errno.EIO)
    # A pause that is not ended lasts for an hour, and the transfer keeps its memory for as long.
    native_readers.Config = Patient  # type: ignore[misc]
    with _readers(retry_delay_s=LONG_MS / 1e3) as readers:
        transfer = _submit(readers, file)
        wait_for(lambda: readers.statistics().retries >= 2)
        transfer.cancel()
        del transfer
        faults.set()
        _until_owners_are_gone(readers, file)


def cancel_waits_for_the_read_in_flight(faults: Faults, file: PosixFile) -> None:
    native_transfer.CANCEL_GRACE_S = LONG_MS / 1e3  # else a stall of the machine looks like a stuck read
    faults.set(stall_every=1, stall_ms=LONG_MS)
    owner = Owner(file.size)
    with _readers() as readers:
        transfer = _submit(readers, file, owner)
        faults.wait_for_stall()
        cancelling = threading.Thread(target=transfer.cancel)
        cancelling.start()
        cancelling.join(0.3)
        assert cancelling.is_alive()
        faults.set()
        cancelling.join()
        snapshot = owner.memory.copy()
        faults.set()
        _assert_arrives(readers, file)
        assert np.array_equal(owner.memory, snapshot)
        _assert_cancelled(transfer)


def cancel_gives_up_a_stuck_read_but_keeps_its_memory(faults: Faults, file: PosixFile) -> None:
    faults.set(stall_every=1, stall_ms=LONG_MS)
    with _readers() as readers:
        transfer = _submit(readers, file, Owner(file.size))
        faults.wait_for_stall()
        with _lasts_at_least(0.3):
            transfer.cancel()
        faults.assert_stuck()
        del transfer
        gc.collect()
        assert Owner.alive == 1
        faults.set()
        _until_owners_are_gone(readers, file)


def a_stuck_read_fails_at_its_deadline(faults: Faults, file: PosixFile) -> None:
    faults.set(stall_every=1, stall_ms=LONG_MS)
    with _readers(deadline_s=0.4) as readers:
        transfers = [_submit(readers, file) for _ in range(4)]
        with _lasts_at_least(0.3):
            errors = [_failure(transfer) for transfer in transfers]  # also of those that no thread ever got to
        faults.assert_stuck()
        for error in errors:
            assert error.errno == errno.ETIMEDOUT and error.file == file.path and "no byte came for 0.4 s" in str(error)
        faults.set()


@any_try(5)
def progress_moves_the_deadline(faults: Faults, file: PosixFile) -> None:
    faults.set(stall_every=1, stall_ms=100)  # in each of 16 reads
    with _readers(1, deadline_s=1.2, block_bytes=32 << 10) as readers, _lasts_at_least(1.4):
        _assert_arrives(readers, file)


def close_gives_up_a_stuck_read(faults: Faults, file: PosixFile) -> None:
    before = open_resources()
    faults.set(stall_every=1, stall_ms=LONG_MS)
    readers = NativeReaders(2)
    transfer = _submit(readers, file, Owner(file.size))
    faults.wait_for_stall()
    with _lasts_at_least(0.3):
        readers.close()
    faults.assert_stuck()
    _assert_cancelled_or_late(transfer)
    del readers, transfer
    assert Owner.alive == 1
    faults.set()
    assert left_open(before) == []
    with _readers() as other:
        _until_owners_are_gone(other, file)


def ctrl_c_is_noticed(faults: Faults, file: PosixFile) -> None:
    faults.set(stall_every=1, stall_ms=LONG_MS)
    try:
        with _readers() as readers:
            transfer = _submit(readers, file)
            faults.wait_for_stall()
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
            transfer.wait()
    except KeyboardInterrupt:
        faults.assert_stuck()
        faults.set()
        return
    raise AssertionError("Ctrl-C was not noticed")


def thousand_rounds(faults: Faults, file: PosixFile) -> None:
    """Random plans with random faults: the right bytes or the right error, and nothing is left behind."""
    chance = random.Random(7)
    data = np.frombuffer(Path(file.path).read_bytes(), np.uint8)
    before, settled = open_resources(), 0
    for number in range(1000):
        if number == 300:
            before, settled = open_resources(), _resident_bytes()
        _random_round(faults, file, data, chance)
    gc.collect()
    assert left_open(before) == []
    assert _resident_bytes() - settled < 16 << 20


def _random_round(faults: Faults, file: PosixFile, data: np.ndarray, chance: random.Random) -> None:
    fault = chance.choice(("none", "error", "short", "both", "stall", "refuse"))
    code = chance.choice((errno.EIO, errno.EINTR, errno.EAGAIN, errno.ESTALE, errno.ENOMEM))
    faults.set(
        error_every=chance.randint(1, 6) if fault in ("error", "both") else 0,
        error=code,
        short_every=chance.randint(1, 4) if fault in ("short", "both") else 0,
        stall_every=chance.randint(5, 20) if fault == "stall" else 0,
        stall_ms=1,
        direct_error=errno.EINVAL if fault == "refuse" else 0,
    )
    mode = chance.choice(("buffered", "direct"))
    block_bytes = chance.choice((4 << 10, 64 << 10, 1 << 20))
    to, expected, plan = _random_plan(data, chance)
    with _readers(chance.randint(1, 3), read_mode=mode, block_bytes=block_bytes, max_tries=4) as readers:
        transfer = readers.submit([file], plan, ordered=chance.random() < 0.5, owner=to)
        ending = chance.random()
        if ending < 0.1:
            transfer.cancel()
        elif ending < 0.2:
            readers.close()
        try:
            transfer.wait()
        except TransferCancelled:
            assert ending < 0.2
        except TransferError as error:
            assert fault in ("error", "both") and error.errno == code, error
        else:
            assert np.array_equal(to, expected)


def _random_plan(data: np.ndarray, chance: random.Random) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rows, parts, place = [], [], 0
    for _ in range(chance.randint(1, 30)):
        offset = chance.randrange(len(data))
        nbytes = min(chance.choice((1, 100, 5000, 200_000)), len(data) - offset)
        parts.append((place, offset, nbytes))
        rows.append(extent(0, offset, nbytes, place))
        place += nbytes + chance.choice((0, 0, 13))
    to = np.full(place, 0xA5, np.uint8)
    expected = to.copy()
    for at, offset, nbytes in parts:
        expected[at : at + nbytes] = data[offset : offset + nbytes]
    plan = make_extents(rows)
    plan["address"] += np.uint64(to.ctypes.data)
    return to, expected, plan


@contextlib.contextmanager
def _logged() -> Iterator[list[str]]:
    """What is logged meanwhile."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("engine_loader").addHandler(handler)
    try:
        yield lines
    finally:
        logging.getLogger("engine_loader").removeHandler(handler)


@contextlib.contextmanager
def _readers(threads: int = 2, **options: object) -> Iterator[NativeReaders]:
    defaults: dict[str, object] = {"block_bytes": 64 << 10, "retry_delay_s": 0.001}
    readers = NativeReaders(threads, **{**defaults, **options})
    try:
        yield readers
    finally:
        readers.close()


def _submit(readers: NativeReaders, file: PosixFile, owner: Owner | None = None) -> NativeTransfer:
    owner = owner or Owner(file.size)
    return readers.submit([file], make_extents([extent(0, 0, file.size, owner.memory.ctypes.data)]), owner=owner)


def _assert_arrives(readers: NativeReaders, file: PosixFile) -> None:
    owner = Owner(file.size)
    assert _submit(readers, file, owner).wait()
    assert owner.memory.tobytes() == Path(file.path).read_bytes()


def _assert_often(readers: NativeReaders, file: PosixFile, times: int) -> None:
    """The file arrives at many places in one transfer."""
    owner = Owner(times * file.size)
    base = owner.memory.ctypes.data
    plan = make_extents([extent(0, 0, file.size, base + number * file.size) for number in range(times)])
    assert readers.submit([file], plan, owner=owner).wait()
    assert owner.memory.tobytes() == times * Path(file.path).read_bytes()


def _failure(transfer: NativeTransfer) -> TransferError:
    try:
        transfer.wait()
    except TransferError as error:
        return error
    raise AssertionError("the transfer did not fail")


def _assert_cancelled(transfer: NativeTransfer) -> None:
    assert isinstance(_failure(transfer), TransferCancelled)


def _assert_cancelled_or_late(transfer: NativeTransfer) -> None:
    with contextlib.suppress(TransferError):
        assert not transfer.wait(timeout_s=0)


@contextlib.contextmanager
def _lasts_at_least(seconds: float) -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began >= seconds


def _until_owners_are_gone(readers: NativeReaders, file: PosixFile) -> None:
    """Transfers find, one or the other, that reads which were given up have come back."""

    def gone() -> bool:
        _assert_arrives(readers, file)
        gc.collect()
        return Owner.alive == 0

    wait_for(gone)


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


SCENARIOS: dict[str, Callable[[Faults, PosixFile], None]] = {
    function.__name__: function
    for function in (
        errors_pass,
        errors_stay,
        a_slow_file_is_named,
        short_reads_are_resumed,
        direct_reads_may_be_refused,
        more_reads_at_once_where_they_bring_more,
        no_more_reads_at_once_where_they_bring_nothing,
        threads_that_are_set_stay,
        threads_above_the_limit_do_not_hide_a_stuck_read,
        huge_pages_that_take_long_give_way_to_small_ones,
        huge_pages_that_are_quick_stay,
        huge_pages_are_tried_again,
        a_wait_can_time_out,
        cancel_ends_a_pause,
        cancel_waits_for_the_read_in_flight,
        cancel_gives_up_a_stuck_read_but_keeps_its_memory,
        a_stuck_read_fails_at_its_deadline,
        progress_moves_the_deadline,
        close_gives_up_a_stuck_read,
        ctrl_c_is_noticed,
        thousand_rounds,
    )
}


def main() -> None:
    name, folder = sys.argv[1:]
    path = Path(folder) / "file"
    path.write_bytes(np.random.default_rng(1).bytes(500_003))
    with open(path, "rb") as written:
        os.fsync(written.fileno())
    file = PosixSource().open(str(path))
    SCENARIOS[name](Faults(), file)
    file.close()


if __name__ == "__main__":
    main()
