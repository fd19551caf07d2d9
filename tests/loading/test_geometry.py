"""view_extents: the bytes of any view go to where they belong in any memory, in as few runs as that takes."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine_loader.loading.geometry import contiguous_strides, joined, view_extents
from engine_loader.transfer.plan import ExtentRow


def carry_out(extents: list[ExtentRow], content: bytes, memory: bytearray) -> int:
    """Copy as an engine would, with addresses that are offsets in ``memory``; returns the bytes copied."""
    copied = 0
    for _, rows, offset, row_bytes, src_stride, address, dst_stride in extents:
        for row in range(rows):
            begin, place = offset + row * src_stride, address + row * dst_stride
            memory[place : place + row_bytes] = content[begin : begin + row_bytes]
            copied += row_bytes
    return copied


@st.composite
def views(draw: st.DrawFn, *, repeats: bool) -> torch.Tensor:
    """A view of a tensor of numbers: sliced, permuted, and where ``repeats``, expanded."""
    shape = draw(st.lists(st.integers(1, 4), max_size=4))
    view = torch.arange(int(np.prod(shape)), dtype=torch.int32).reshape(shape)
    for dim, size in enumerate(shape):
        begin = draw(st.integers(0, size - 1))
        view = view.narrow(dim, begin, size - begin)[
            (slice(None),) * dim + (slice(None, None, draw(st.integers(1, 2))),)
        ]
    view = view.permute(draw(st.permutations(range(view.dim()))))
    if repeats and draw(st.booleans()):
        view = view.unsqueeze(0).expand(3, *view.shape)
    return view


@given(views(repeats=True), st.data())
def test_any_view_is_copied_into_memory_of_any_strides(view, data):
    content = b"head" + bytes(view.untyped_storage())
    order = data.draw(st.permutations(range(view.dim())))
    padded = [size + data.draw(st.integers(0, 1)) for size in view.shape]
    target = torch.full([padded[dim] for dim in order], -1, dtype=torch.int32)
    place = target.permute([order.index(dim) for dim in range(view.dim())])
    for dim, size in enumerate(view.shape):
        place = place.narrow(dim, 0, size)
    extents = view_extents(
        7,
        4 + view.storage_offset() * 4,
        4,
        view.shape,
        src_strides=view.stride(),
        dst_strides=place.stride(),
        address=0,
    )
    memory = bytearray(bytes(target.untyped_storage()))
    assert carry_out(extents, content, memory) == view.numel() * 4
    target.untyped_storage().copy_(torch.frombuffer(memory, dtype=torch.uint8).untyped_storage())
    assert torch.equal(place, view)
    assert int((target != -1).sum()) == view.numel()
    assert {extent[0] for extent in extents} <= {7}


def shapes_of(view: torch.Tensor) -> list[tuple[int, int]]:
    """(rows, bytes of a row) of each extent of a copy into new memory."""
    strides = contiguous_strides(view.shape)
    extents = view_extents(0, 0, view.itemsize, view.shape, src_strides=view.stride(), dst_strides=strides, address=0)
    return [(extent[1], extent[3]) for extent in extents]


@pytest.mark.parametrize(
    ("view", "expected"),
    [
        (torch.empty(4, 5, 6), [(1, 480)]),
        (torch.empty(()), [(1, 4)]),
        (torch.empty(0, 3), []),
        (torch.empty(4, 5, 6)[1:3], [(1, 240)]),
        (torch.empty(4, 5, 6)[:, 1:3], [(4, 48)]),
        (torch.empty(4, 5, 6)[:, :, :2], [(20, 8)]),
        (torch.empty(4, 5, 6)[:, 1:3, :2], [(2, 8)] * 4),
        (torch.empty(4, 5, 6)[2, 3], [(1, 24)]),
        (torch.empty(1, 4, 1, 6), [(1, 96)]),
        (torch.empty(8)[::2], [(4, 4)]),
    ],
)
def test_neighbours_are_joined_into_runs_and_rows(view, expected):
    assert shapes_of(view) == expected


@given(st.lists(st.integers(0, 4), max_size=4))
def test_contiguous_strides_are_those_of_torch(sizes):
    assert contiguous_strides(sizes) == list(torch.empty(sizes).stride())


@pytest.mark.parametrize(
    ("ranges", "gap_bytes", "expected"),
    [
        ([], 0, []),
        ([(10, 5), (0, 10)], 0, [(0, 15)]),
        ([(0, 10), (11, 5)], 0, [(0, 10), (11, 5)]),
        ([(0, 10), (11, 5), (18, 2)], 1, [(0, 16), (18, 2)]),
        ([(0, 100), (10, 5), (50, 60)], 0, [(0, 110)]),
    ],
)
def test_ranges_that_touch_or_nearly_do_are_joined(
    ranges: list[tuple[int, int]], gap_bytes: int, expected: list[tuple[int, int]]
) -> None:
    assert joined(ranges, gap_bytes) == expected
