"""What native reader threads promise: right bytes, reported as they come, and nothing left behind."""

from __future__ import annotations

import contextlib
import gc
import itertools
import mmap
import os
import resource
import select
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from engine_loader.errors import CheckpointError, TransferCancelled, TransferError
from engine_loader.sources.memory import MemorySource
from engine_loader.sources.posix import PosixFile
from engine_loader.transfer.modes import ReadMode
from engine_loader.transfer.native import library as native_library
from engine_loader.transfer.native.native_readers import NativeReaders, NativeTransfer
from engine_loader.transfer.plan import Extents, extent, make_extents
from tests.support.mappings import need_huge_pages, vm_flags
from tests.support.resources import left_open, open_resources

MakeFile = Callable[[int], PosixFile]


def content(file: PosixFile) -> bytes:
    return Path(file.path).read_bytes()


def memory(nbytes: int) -> np.ndarray:
    return np.full(nbytes, 0xA5, np.uint8)


def address(array: np.ndarray) -> int:
    return int(array.ctypes.data)


def test_a_whole_file_arrives(readers: NativeReaders, make_file: MakeFile) -> None:
    file = make_file(3_000_001)
    to = memory(file.size)
    transfer = readers.submit([file], make_extents([extent(0, 0, file.size, address(to))]))
    assert transfer.wait()
    assert to.tobytes() == content(file)
    assert transfer.bytes_done == transfer.nbytes == file.size


def test_neighbours_of_several_files_go_to_scattered_places(readers: NativeReaders, make_file: MakeFile) -> None:
    files = [make_file(200_003), make_file(100_001)]
    to = memory(1 << 20)
    rows, expected, place = [], to.copy(), 0
    for number, file in enumerate(files):
        for offset in range(0, file.size, 1009):
            length = min(1009, file.size - offset)
            rows.append(extent(number, offset, length, address(to) + place))
            expected[place : place + length] = np.frombuffer(content(file)[offset : offset + length], np.uint8)
            place += length + 7
    readers.submit(files, make_extents(rows[::-1])).wait()
    assert np.array_equal(to, expected)


@pytest.mark.parametrize("stride", [64, 65, 4000, 100_000])
def test_rows_of_a_slice_arrive(readers: NativeReaders, make_file: MakeFile, stride: int) -> None:
    file = make_file(20 * stride + 64)
    to = memory(20 * 80)
    readers.submit([file], make_extents([(0, 20, 5, 60, stride, address(to), 80)])).wait()
    data = content(file)
    for row in range(20):
        assert to[80 * row : 80 * row + 60].tobytes() == data[5 + row * stride : 65 + row * stride]
        assert set(to[80 * row + 60 : 80 * row + 80]) == {0xA5}


def test_bytes_that_two_extents_want_arrive_at_both(readers: NativeReaders, make_file: MakeFile) -> None:
    file = make_file(100_000)
    to = memory(3 * 100_000)
    rows = [extent(0, 0, 100_000, address(to)), extent(0, 0, 100_000, address(to) + 100_000)]
    rows.append((0, 10, 500, 1000, 0, address(to) + 200_000, 1000))  # one row, ten times
    readers.submit([file], make_extents(rows)).wait()
    data = content(file)
    assert to.tobytes() == data + data + data[500:1500] * 10 + b"\xa5" * 90_000


def test_an_extent_without_bytes_is_complete_at_once(readers: NativeReaders, make_file: MakeFile) -> None:
    file = make_file(10)
    transfer = readers.submit([file], make_extents([extent(0, 10, 0, 0), (0, 0, 0, 5, 5, 0, 5)]))
    assert transfer.wait(0, timeout_s=0) and transfer.wait(1, timeout_s=0) and transfer.wait()
    assert readers.submit([], make_extents([])).wait()


@pytest.mark.parametrize("ordered", [True, False])
def test_extents_are_reported_as_they_complete(make_file: MakeFile, ordered: bool) -> None:
    file = make_file(4 << 20)
    # Of several threads any may be the slower one; a single one shows the order in which they take blocks.
    readers = NativeReaders(1 if ordered else 2, block_bytes=64 << 10)
    to = memory(file.size)
    step = 1 << 18
    rows = [extent(0, offset, step, address(to) + offset) for offset in range(0, file.size, step)]
    transfer = readers.submit([file], make_extents(rows), ordered=ordered)
    data = content(file)
    poll = select.poll()
    poll.register(transfer.event_fd(), select.POLLIN)
    seen: list[int] = []
    while len(seen) < len(rows):
        assert poll.poll(10_000)
        os.read(transfer.event_fd(), 8)
        for number in transfer.completed(len(seen)):
            seen.append(int(number))
            at = int(number) * step
            assert to[at : at + step].tobytes() == data[at : at + step]
            assert transfer.wait(int(number), timeout_s=0)
    readers.close()
    assert sorted(seen) == list(range(len(rows)))
    assert not ordered or seen == sorted(seen)


def test_direct_reads_and_odd_offsets(make_file: MakeFile) -> None:
    file = make_file((8 << 20) + 13)
    to = memory(file.size)
    readers = NativeReaders(4, read_mode="direct")
    cuts = [0, 1, 511, 512, 4096, 4097, 100_000, 5 << 20, (8 << 20) + 12, file.size]
    rows = [extent(0, a, b - a, address(to) + a) for a, b in itertools.pairwise(cuts)]
    readers.submit([file], make_extents(rows)).wait()
    assert to.tobytes() == content(file)
    modes = readers.statistics().modes
    assert sum(modes.values()) == file.size
    readers.close()


def test_direct_reads_go_straight_to_aligned_memory(make_file: MakeFile) -> None:
    file = make_file(4 << 20)
    to = np.frombuffer(mmap.mmap(-1, file.size), np.uint8)
    with contextlib.closing(NativeReaders(2, read_mode="direct")) as readers:
        readers.submit([file], make_extents([extent(0, 4096, file.size - 4096 - 5, address(to))])).wait()
        counters = readers.counters()
    assert to.tobytes()[: file.size - 4101] == content(file)[4096:-5]
    assert counters["direct_straight_bytes"] == counters["direct_bytes"]


def test_a_mixed_file_is_read_right(make_file: MakeFile, monkeypatch: pytest.MonkeyPatch) -> None:
    file = make_file(8 << 20)
    fd = file.fileno()
    assert fd is not None
    os.posix_fadvise(fd, 0, 4 << 20, os.POSIX_FADV_DONTNEED)
    choice = ReadMode("mixed", True, "for the test")
    monkeypatch.setattr("engine_loader.transfer.native.native_readers.choose_mode", lambda *_: choice)
    to = memory(file.size)
    with contextlib.closing(NativeReaders(2)) as readers:
        readers.submit([file], make_extents([extent(0, 0, file.size, address(to))])).wait()
        assert to.tobytes() == content(file)
        assert readers.statistics().bytes_read == file.size


def test_the_file_system_may_refuse_direct_reads(make_file: MakeFile, monkeypatch: pytest.MonkeyPatch) -> None:
    file = make_file(100_000)
    monkeypatch.setattr("engine_loader.transfer.native.native_readers.open_direct", lambda _: -1)
    to = memory(file.size)
    with contextlib.closing(NativeReaders(1, read_mode="direct")) as readers:
        readers.submit([file], make_extents([extent(0, 0, file.size, address(to))])).wait()
        assert readers.statistics().modes == {"buffered": file.size}
    assert to.tobytes() == content(file)


def test_an_extent_beyond_the_file_is_refused(readers: NativeReaders, make_file: MakeFile) -> None:
    with pytest.raises(CheckpointError, match="ends beyond"):
        readers.submit([make_file(10)], make_extents([extent(0, 5, 6, 0)]))


def test_a_file_cut_short_is_an_error_with_its_place(readers: NativeReaders, make_file: MakeFile) -> None:
    file = make_file(300_000)
    os.truncate(file.path, 123_456)
    to = memory(file.size)
    transfer = readers.submit([file], make_extents([extent(0, 0, file.size, address(to))]))
    with pytest.raises(TransferError, match="the file ended here") as caught:
        transfer.wait()
    assert caught.value.file == file.path
    assert caught.value.offset is not None and caught.value.offset >= 123_456
    with pytest.raises(TransferError, match="the file ended here"):  # each wait tells it
        transfer.wait()


def test_an_error_that_does_not_pass_is_not_tried_again(readers: NativeReaders, tmp_path: Path) -> None:
    (tmp_path / "written").write_bytes(b"x" * 100)
    fd = os.open(tmp_path / "written", os.O_WRONLY)
    file = PosixFile(str(tmp_path / "written"), fd, os.stat(tmp_path / "written"))
    to = memory(100)
    with pytest.raises(TransferError, match="EBADF") as caught:
        readers.submit([file], make_extents([extent(0, 0, 100, address(to))])).wait()
    assert readers.statistics().retries == 0
    assert caught.value.file == file.path


def test_a_source_without_descriptors_is_a_mistake(readers: NativeReaders) -> None:
    source = MemorySource({"a": b"abc"})
    with pytest.raises(TypeError, match="no descriptor"):
        readers.submit([source.open("a")], make_extents([extent(0, 0, 3, 0)]))


def test_cancel_ends_a_transfer_and_only_that(readers: NativeReaders, make_file: MakeFile) -> None:
    file = make_file(30 << 20)
    first, second = memory(file.size), memory(file.size)
    # So many times over that it cannot be complete when it is cancelled.
    times = (2000, 1)
    plans = [
        make_extents([extent(0, 0, file.size, address(to))] * n) for to, n in zip((first, second), times, strict=True)
    ]
    cancelled, kept = (readers.submit([file], plan) for plan in plans)
    cancelled.cancel()
    snapshot = first.copy()
    with pytest.raises(TransferCancelled):
        cancelled.wait()
    assert kept.wait()
    assert second.tobytes() == content(file)
    assert np.array_equal(first, snapshot)
    kept.cancel()  # does nothing to what is complete
    assert kept.wait()


def test_close_in_mid_flight_leaves_nothing_behind(make_file: MakeFile) -> None:
    file = make_file(30 << 20)
    to = memory(file.size)
    # So many times over that it cannot be complete when the reader threads are closed.
    plan = make_extents([extent(0, 0, file.size, address(to))] * 2000)
    gc.collect()
    before = open_resources()
    for number in range(20):
        readers = NativeReaders(3, block_bytes=1 << 20, read_mode=("buffered", "direct")[number % 2])
        transfer = readers.submit([file], plan)
        assert any(text.startswith("thread el-") for text in open_resources().values())
        readers.close()
        readers.close()
        snapshot = to[:: 1 << 12].copy()
        with pytest.raises(TransferError, match="cancelled"):
            transfer.wait()
        assert np.array_equal(to[:: 1 << 12], snapshot)
        with pytest.raises(TransferError, match="closed"):
            readers.submit([file], make_extents([extent(0, 0, 1, address(to))]))
    del transfer, readers
    assert left_open(before) == []


def test_an_reader_threads_that_is_forgotten_is_closed(make_file: MakeFile) -> None:
    file = make_file(1 << 20)
    to = memory(file.size)
    gc.collect()
    before = open_resources()
    readers = NativeReaders(2)
    readers.submit([file], make_extents([extent(0, 0, file.size, address(to))])).wait()
    del readers
    assert left_open(before) == []


def test_the_owner_is_held_until_the_transfer_has_ended(readers: NativeReaders, make_file: MakeFile) -> None:
    file = make_file(1 << 20)

    class Owner:
        gone = False

        def __init__(self) -> None:
            self.memory = memory(file.size)

        def __del__(self) -> None:
            Owner.gone = True

    owner = Owner()
    plan = make_extents([extent(0, 0, file.size, address(owner.memory))])
    transfer = readers.submit([file], plan, owner=owner)
    del owner
    assert not Owner.gone
    transfer.wait()
    assert Owner.gone


def test_a_child_process_cannot_use_the_readers(readers: NativeReaders, make_file: MakeFile) -> None:
    file = make_file(8 << 20)
    to = memory(file.size)
    plan = make_extents([extent(0, 0, file.size, address(to))])
    transfer = readers.submit([file], plan)
    child = os.fork()
    if child == 0:
        os._exit(_use_in_child(readers, transfer, file, plan))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert transfer.wait()
    assert to.tobytes() == content(file)


def _use_in_child(readers: NativeReaders, transfer: NativeTransfer, file: PosixFile, plan: Extents) -> int:
    """0 when every call ends at once, and as it should."""
    try:
        for call in (transfer.wait, lambda: readers.submit([file], plan)):
            try:
                call()
                return 1
            except TransferError as error:
                if "fork" not in str(error):
                    return 2
        transfer.cancel()
        readers.close()
        new = NativeReaders(1)
        new.submit([file], plan).wait()
        new.close()
    except BaseException:
        return 3
    return 0


def test_many_threads_share_an_readers(readers: NativeReaders, make_file: MakeFile) -> None:
    file = make_file(2 << 20)
    data = content(file)
    wrong: list[int] = []

    def use(number: int) -> None:
        for _ in range(5):
            to = memory(file.size)
            readers.submit([file], make_extents([extent(0, number, file.size - number, address(to))])).wait()
            if to.tobytes()[: file.size - number] != data[number:]:
                wrong.append(number)

    users = [threading.Thread(target=use, args=(number,)) for number in range(8)]
    for user in users:
        user.start()
    for user in users:
        user.join()
    assert not wrong


def test_many_small_extents_arrive(make_file: MakeFile) -> None:
    file = make_file(64 << 20)
    to = memory(file.size)
    step = file.size // 100_000
    rows = [extent(0, offset, step, address(to) + offset) for offset in range(0, step * 100_000, step)]
    plan = make_extents(rows)
    plan["address"][::2] += 1  # so that no two are neighbours in memory
    plan["row_bytes"][::2] -= 1
    with contextlib.closing(NativeReaders(2)) as readers:
        readers.submit([file], plan).wait()
    data = np.frombuffer(content(file), np.uint8)
    assert np.array_equal(to[1 : step - 1], data[: step - 2]) and np.array_equal(
        to[step : 2 * step], data[step : 2 * step]
    )


def test_who_waits_for_all_is_not_woken_for_each(make_file: MakeFile) -> None:
    # Where all cores copy bytes, each time that the waiting thread wakes up stops one of them.
    file = make_file(64 << 20)
    to = memory(file.size)
    rows = [extent(0, offset, 64 << 10, address(to) + offset) for offset in range(0, file.size, 64 << 10)]
    readers = NativeReaders(1, block_bytes=64 << 10)
    try:
        transfer = readers.submit([file], make_extents(rows))
        before = resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
        transfer.wait()
        assert resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw - before < len(rows) // 4
    finally:
        readers.close()
    assert to.tobytes() == content(file)


def test_large_destinations_get_huge_pages(make_file: MakeFile) -> None:
    need_huge_pages()
    file = make_file(16 << 20)
    with (
        mmap.mmap(-1, file.size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as area,
        contextlib.closing(NativeReaders(2)) as readers,
    ):
        to = np.frombuffer(area, np.uint8)
        readers.submit([file], make_extents([extent(0, 0, file.size, address(to))])).wait()
        assert "hg" in vm_flags(address(to) + (8 << 20))
        assert to.tobytes() == content(file)
        del to


def test_a_missing_library_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_library, "library_path", lambda: tmp_path / "none.so")
    with pytest.raises(TransferError, match=r"was not built .* compiler"):
        native_library.load_library.__wrapped__()
    (tmp_path / "none.so").write_bytes(b"not a library")
    with pytest.raises(TransferError, match="cannot be loaded"):
        native_library.load_library.__wrapped__()


def test_a_library_of_another_build_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_library, "_ABI_VERSION", 999)
    with pytest.raises(TransferError, match="of another build"):
        native_library.load_library.__wrapped__()
