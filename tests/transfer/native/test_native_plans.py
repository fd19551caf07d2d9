"""Generated plans: whatever they look like, the memory ends up as plain reads would leave it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_loader.sources.posix import PosixFile, PosixSource
from engine_loader.transfer.modes import ReadMode
from engine_loader.transfer.native import native_readers
from engine_loader.transfer.native.native_readers import NativeReaders
from engine_loader.transfer.plan import make_extents

SIZES = (1, 4096, 70_001, 300_000)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[PosixFile]]:
    folder = tmp_path_factory.mktemp("plans")
    for number, nbytes in enumerate(SIZES):
        (folder / str(number)).write_bytes(np.random.default_rng(number).bytes(nbytes))
    opened = [PosixSource().open(str(folder / str(number))) for number in range(len(SIZES))]
    yield opened
    for file in opened:
        file.close()


@st.composite
def extents(draw: st.DrawFn) -> tuple[int, int, int, int, int, int, int]:
    """(file, rows, offset, row_bytes, src_stride, room before it in memory, room between its rows)."""
    file = draw(st.integers(0, len(SIZES) - 1))
    offset = draw(st.integers(0, SIZES[file]))
    rows = draw(st.one_of(st.just(1), st.integers(0, 70)))
    most = (SIZES[file] - offset) // max(rows, 1)
    row_bytes = draw(st.one_of(st.integers(0, most), st.integers(0, min(most, 40))))
    stride = (SIZES[file] - offset - row_bytes) // (rows - 1) if rows > 1 else 1 << 40
    src_stride = draw(st.one_of(st.integers(0, stride), st.just(min(stride, row_bytes))))
    return file, rows, offset, row_bytes, src_stride, draw(st.integers(0, 70)), draw(st.integers(0, 30) | st.just(0))


def _lay_out(
    plan: list[tuple[int, int, int, int, int, int, int]], contents: list[np.ndarray]
) -> tuple[list[tuple[int, int, int, int, int, int, int]], np.ndarray]:
    """The plan with places in memory, relative to its start, and what the memory must be in the end."""
    rows_of_plan, parts, place = [], [], 0
    for file, rows, offset, row_bytes, src_stride, before, between in plan:
        place += before
        rows_of_plan.append((file, rows, offset, row_bytes, src_stride, place, row_bytes + between))
        for row in range(rows):
            begin = offset + row * src_stride
            parts.append((place, contents[file][begin : begin + row_bytes]))
            place += row_bytes + between
    expected = np.full(place + 1, 0xA5, np.uint8)
    for at, part in parts:
        expected[at : at + len(part)] = part
    return rows_of_plan, expected


@pytest.mark.parametrize("mode", ["buffered", "direct", "mixed"])
@given(
    plan=st.lists(extents(), max_size=25),
    block_bytes=st.sampled_from([4 << 10, 12 << 10, 64 << 10, 4 << 20]),
    threads=st.integers(1, 4),
    wide=st.booleans(),
    ordered=st.booleans(),
)
def test_memory_is_as_plain_reads_would_leave_it(
    files: list[PosixFile],
    mode: str,
    plan: list[tuple[int, int, int, int, int, int, int]],
    block_bytes: int,
    threads: int,
    wide: bool,
    ordered: bool,
) -> None:
    contents = [np.fromfile(file.path, np.uint8) for file in files]
    rows, expected = _lay_out(plan, contents)
    to = np.full_like(expected, 0xA5)
    extents_of_plan = make_extents(rows)
    extents_of_plan["address"] += np.uint64(to.ctypes.data)
    with pytest.MonkeyPatch.context() as patch:
        choice = ReadMode(mode, wide, "generated")
        patch.setattr(native_readers, "choose_mode", lambda *_: choice)
        with contextlib.closing(NativeReaders(threads, block_bytes=block_bytes)) as readers:
            transfer = readers.submit(files, extents_of_plan, ordered=ordered)
            assert transfer.wait()
            assert transfer.bytes_done == readers.statistics().bytes_read
            assert sorted(transfer.completed()) == list(range(len(plan)))
    assert np.array_equal(to, expected)
