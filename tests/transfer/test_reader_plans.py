"""Whatever the plan: every byte arrives where it belongs, and nothing beside it is touched."""

import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine_loader.errors import CheckpointError
from engine_loader.transfer.plan import ExtentRow, extent, make_extents
from tests.support.checkpoints import noise
from tests.transfer.conftest import GUARD, Destination, read, start

CONTENTS = [noise(200_003, 1), noise(4096, 2), b"x", b""]
BLOCK_BYTES = 4096


@pytest.fixture
def files(opened):
    return [opened(content) for content in CONTENTS]


@st.composite
def plans(draw: st.DrawFn) -> tuple[list[ExtentRow], int]:
    """Extents with destinations apart from each other, and the bytes of memory that they take."""
    rows: list[ExtentRow] = []
    place = draw(st.integers(0, 9))
    for _ in range(draw(st.integers(0, 12))):
        number = draw(st.sampled_from([0, 0, 0, 1, 2, 3]))
        size = len(CONTENTS[number])
        row_bytes = min(size, draw(st.sampled_from([0, 1, 2, 3, 511, 512, 4095, 4096, 4097, 30_000, 200_003])))
        room = size - row_bytes
        offset = draw(st.integers(0, room) | st.sampled_from([0, room, room // 2 // 512 * 512]))
        count = draw(st.sampled_from([1, 1, 1, 0, 2, 3, 50]))
        stride = draw(st.sampled_from([row_bytes, 0, row_bytes + 1, row_bytes + 700, 70_000, max(0, row_bytes - 1)]))
        if count > 1 and stride:
            count = min(count, 1 + (room - offset) // stride)
        gap = draw(st.sampled_from([0, 0, 1, 100])) if count > 1 else draw(st.sampled_from([0, 999]))
        rows.append((number, count, offset, row_bytes, stride, place, row_bytes + gap))
        place += max(0, count - 1) * (row_bytes + gap) + row_bytes + draw(st.sampled_from([0, 0, 0, 1, 7, 4096]))
    return draw(st.permutations(rows)), place + 16


def expected(rows: list[ExtentRow], nbytes: int) -> bytes:
    memory = bytearray([GUARD]) * nbytes
    for number, count, offset, row_bytes, src_stride, address, dst_stride in rows:
        for row in range(count):
            begin, place = offset + row * src_stride, address + row * dst_stride
            memory[place : place + row_bytes] = CONTENTS[number][begin : begin + row_bytes]
    return bytes(memory)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(made=plans(), ordered=st.booleans(), block_bytes=st.sampled_from([4096, 65536, 1 << 20]))
def test_generated_plans_arrive_bit_for_bit(make_readers, files, made, ordered, block_bytes):
    rows, nbytes = made
    readers = make_readers(block_bytes=block_bytes)
    try:
        assert read(readers, files, rows, nbytes, ordered=ordered) == expected(rows, nbytes)
        assert readers.statistics().bytes_read >= 0
    finally:
        readers.close()


def check(make_readers, files, rows: list[ExtentRow], nbytes: int) -> None:
    for ordered in (True, False):
        readers = make_readers(block_bytes=BLOCK_BYTES)
        assert read(readers, files, rows, nbytes, ordered=ordered) == expected(rows, nbytes)


def test_an_empty_plan_is_complete_at_once(make_readers, files):
    check(make_readers, files, [], 8)
    transfer = make_readers().submit([], make_extents([]))
    assert transfer.wait(timeout_s=0)
    assert (transfer.nbytes, transfer.bytes_done) == (0, 0)


def test_extents_without_bytes_are_complete_at_once(make_readers, files):
    target = Destination(16)
    rows = [extent(3, 0, 0, 0), extent(0, 200_003, 0, 0), (0, 0, 5, 100, 0, 0, 0), (0, 5, 5, 0, 0, 0, 0)]
    transfer = start(make_readers(), files, rows, target)
    assert all(transfer.wait(number, timeout_s=0) for number in range(4))
    assert transfer.wait(timeout_s=0)
    assert bytes(target) == bytes([GUARD]) * 16


def test_one_source_may_be_wanted_many_times(make_readers, files):
    rows = [extent(0, 1000, 5000, number * 5000) for number in range(10)]
    rows += [(0, 30, 77, 100, 0, 50_000, 100), (0, 30, 77, 100, 1, 53_000, 100)]
    check(make_readers, files, rows, 56_000)


@pytest.mark.parametrize("offset", [0, 1, 511, 512, 4095, 4097])
@pytest.mark.parametrize("address", [0, 1, 511, 4096])
def test_odd_offsets_and_odd_addresses(make_readers, files, offset, address):
    check(make_readers, files, [extent(0, offset, 30_001, address)], 35_000)


def test_many_tiny_extents(make_readers, files):
    check(make_readers, files, [extent(0, number * 9 % 200_000, 3, number * 3) for number in range(20_000)], 60_000)


def test_neighbours_in_reverse_and_interleaved(make_readers, files):
    halves = [extent(0, number * 100, 100, (number % 2) * 50_000 + number // 2 * 100) for number in range(1000)]
    check(make_readers, files, halves[::-1], 100_000)


def test_the_ends_of_files_are_read_to_the_last_byte(make_readers, files):
    check(make_readers, files, [extent(0, 200_002, 1, 0), extent(1, 4095, 1, 1), extent(2, 0, 1, 2)], 3)


@pytest.mark.parametrize(
    ("row_bytes", "stride"), [(1, 2), (2, 1000), (1000, 1001), (5000, 66_000), (50_000, 51_000), (3, 66_600)]
)
def test_rows_dense_and_sparse(make_readers, files, row_bytes, stride):
    count = 1 + (200_003 - 5 - row_bytes) // stride
    rows = [(0, count, 5, row_bytes, stride, 3, row_bytes + 2)]
    check(make_readers, files, rows, count * (row_bytes + 2) + 10)


def test_a_large_file(make_readers, opened):
    content = noise(1 << 20, 9) * 24
    file = opened(content)
    assert (
        read(
            make_readers(threads=3, block_bytes=1 << 20), [file], [extent(0, 1, len(content) - 1, 0)], len(content) - 1
        )
        == content[1:]
    )


def test_files_of_one_plan_are_kept_apart(make_readers, opened):
    contents = [noise(1000, seed) for seed in range(30)]
    opened_files = [opened(content) for content in contents]
    rows = [extent(number, 0, 1000, number * 1000) for number in range(30)]
    assert read(make_readers(), opened_files, rows, 30_000) == b"".join(contents)


def test_many_transfers_at_once(make_readers, files):
    readers = make_readers(threads=4, block_bytes=BLOCK_BYTES)
    targets = [Destination(20_000) for _ in range(40)]
    transfers = [start(readers, files, [extent(0, n * 1000, 20_000, 0)], target) for n, target in enumerate(targets)]
    for transfer in reversed(transfers):
        assert transfer.wait()
    assert all(bytes(target) == CONTENTS[0][n * 1000 : n * 1000 + 20_000] for n, target in enumerate(targets))


def test_an_extent_can_be_waited_for_before_all_is_there(make_readers, files):
    rows = [extent(0, number * 1000, 1000, number * 1000) for number in range(200)]
    target = Destination(200_000)
    transfer = start(make_readers(block_bytes=BLOCK_BYTES), files, rows, target)
    for number in (199, 0, 100):
        assert transfer.wait(number, timeout_s=30)
        begin = number * 1000
        assert bytes(target)[begin : begin + 1000] == CONTENTS[0][begin : begin + 1000]
    assert transfer.wait()
    assert transfer.wait(5)


def test_a_plan_that_reaches_beyond_its_file_is_refused_before_anything_is_read(make_readers, files):
    readers = make_readers()
    target = Destination(10)
    with pytest.raises(
        CheckpointError, match="at byte 200000: the read of 4 bytes ends beyond the file's 200003 bytes"
    ):
        start(readers, files, [extent(0, 0, 1, 0), extent(0, 200_000, 4, 0)], target)
    assert bytes(target) == bytes([GUARD]) * 10
    assert readers.statistics().reads == 0


def test_the_account_counts_bytes_and_reads(make_readers, files):
    readers = make_readers(block_bytes=BLOCK_BYTES)
    read(readers, files, [extent(0, 0, 100_000, 0)], 100_000)
    account = readers.statistics()
    assert account.bytes_read == 100_000
    assert account.reads >= 100_000 // BLOCK_BYTES // 2
    assert sum(account.modes.values()) >= 100_000
    assert (account.retries, account.short_reads) == (0, 0)
    assert account.read_seconds > 0


def test_the_plan_may_be_forgotten_once_it_is_submitted(make_readers, files):
    rows = [extent(0, number, 1000, number * 1000) for number in range(100)]
    target = Destination(100_000)
    transfer = start(make_readers(block_bytes=BLOCK_BYTES), files, rows, target)
    del rows
    junk = [os.urandom(4800) for _ in range(100)]
    assert transfer.wait()
    assert bytes(target)[99_000:] == CONTENTS[0][99:1099]
    assert junk
