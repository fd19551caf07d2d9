"""get_slice(name)[index]: what torch gives for the whole tensor, of no more bytes than that takes."""

import itertools
import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from engine_loader import CheckpointError, open_checkpoint
from engine_loader.loading.checkpoint import Checkpoint
from tests.support.checkpoints import checkpoint, encode, entry, tensor_bytes
from tests.support.sources import FakeFile, open_fake

GAP_BYTES = 64 << 10
"""Bytes between wanted ones that reader threads may read along."""


def opened(dtype: str, shape: list[int]) -> tuple[Checkpoint, FakeFile, torch.Tensor]:
    """A checkpoint with the tensor "t" after another one at an odd offset; the reads so far are forgotten."""
    file = FakeFile(checkpoint({"before": entry("U8", [3]), "t": entry(dtype, shape, 5), "after": entry("U8", [9])}))
    found = open_fake(file, threads=1)
    whole = found.get_tensor("t")
    file.reads.clear()
    return found, file, whole


def same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    assert tensor_bytes(ours) == tensor_bytes(theirs)
    assert ours.is_contiguous() or ours.numel() == 0 or ours.stride() == theirs.stride()


@pytest.fixture(scope="module")
def cube():
    """A tensor of shape 4, 5, 6 to index."""
    found, file, whole = opened("I32", [4, 5, 6])
    with found:
        yield found.get_slice("t"), whole, file


INDICES = [
    0,
    -1,
    slice(None),
    slice(1, 3),
    slice(None, None, 2),
    slice(-3, None, 2),
    slice(3, 1),
    slice(-100, 100, 3),
    ...,
    None,
    (),
    (1, 2, 3),
    (..., 1),
    (slice(None), 2),
    (slice(None), slice(1, 4), slice(None, None, 5)),
    (slice(1, 2), ..., slice(0, 3)),
    (None, 1, None, ..., None),
    (0, ..., None, 0),
    np.int64(2),
    torch.tensor(1),
    np.array(3),
    (torch.tensor(-1), slice(None)),
    slice(torch.tensor(1), torch.tensor(3)),
    [0, 2],
    [3, 0, 0, -1],
    [],
    range(1, 3),
    (slice(None), [1, 3]),
    (..., [5, 0]),
    ([0, 1], [1, 2]),
    ([0, 1], slice(None), [1, 2]),
    ([[0, 1], [2, 3]], 0),
    ((0, 1), slice(2)),
    (1, [0, 2], slice(None)),
    (slice(None, None, 2), 1, [0, 2]),
    (None, [1, 2], None),
    torch.tensor([1, 3]),
    torch.tensor([[1, 3], [0, 0]], dtype=torch.int32),
    np.array([2, 2]),
    torch.zeros(0, dtype=torch.int64),
    (torch.tensor([[0], [1]]), torch.tensor([[1, 2]])),
    [True, False, True, False],
    torch.tensor([False] * 4),
    torch.arange(20).reshape(4, 5) % 3 == 0,
    (slice(None), torch.arange(30).reshape(5, 6) % 7 == 0),
    (..., np.array([True, False, True, False, False, True])),
    torch.arange(120).reshape(4, 5, 6) % 11 == 0,
    ([True, False, True, True], slice(None), [0, 1, 2]),
    True,
    False,
    (True, 1),
    (None, True, [1]),
    torch.tensor(True),
    [[0, 1], [1, 2]],
    [slice(0, 2), 1],
    [1.0],
    (..., 1, ...),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("index", INDICES, ids=lambda index: repr(index)[:40].replace("\n", ""))
def test_an_index_means_what_it_means_in_torch(cube, index):
    part, whole, _ = cube
    same(part[index], whole[index])


@pytest.mark.parametrize(
    "index",
    [
        4,
        -5,
        (0, 0, 0, 0),
        (slice(None), 5),
        [0, 4],
        [-5],
        (0, [0], [0], [0]),
        ([0], 9),
        [True, False],
        torch.ones(4, 4, dtype=torch.bool),
        torch.ones(4, 5, 6, 1, dtype=torch.bool),
        ([0, 1], [0, 1, 2]),
        torch.tensor([1.0]),
        torch.tensor([1], dtype=torch.int16),
        1.0,
    ],
    ids=lambda index: repr(index)[:40].replace("\n", ""),
)
def test_an_index_that_does_not_fit_is_an_index_error(cube, index):
    part, whole, _ = cube
    with pytest.raises(IndexError):
        whole[index]
    with pytest.raises(IndexError):
        part[index]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "index", ["a", {0}, slice(None, None, -1), slice(None, None, 0), slice(0.0, 1.0), 10**30, [10**30]]
)
def test_what_torch_does_not_take_is_refused_as_torch_refuses_it(cube, index):
    part, whole, _ = cube
    with pytest.raises((IndexError, TypeError, ValueError, RuntimeError)) as theirs:
        whole[index]
    with pytest.raises(theirs.type):
        part[index]


@st.composite
def indexed(draw: st.DrawFn) -> tuple[list[int], Any]:
    """A shape, and an index of a tensor of this shape."""
    shape = draw(st.lists(st.integers(0, 5), max_size=4))
    items: list[Any] = []
    dim = 0
    while dim < len(shape) and draw(st.integers(0, 9)):
        size = shape[dim]
        kind = draw(st.sampled_from(["slice", "slice", "int", "none", "list", "tensor", "mask", "masks"]))
        if kind == "none":
            items.append(None)
            continue
        rows = st.integers(-size, size - 1) if size else st.nothing()
        if kind == "int" and size:
            items.append(draw(rows))
        elif kind == "list":
            items.append(draw(st.lists(rows, max_size=4)) if size else [])
        elif kind == "tensor":
            lengths = draw(st.lists(st.integers(1, 3), min_size=1, max_size=2)) if size else [0]
            drawn = [draw(rows) for _ in range(math.prod(lengths))]
            items.append(torch.tensor(drawn, dtype=torch.int64).reshape(lengths))
        elif kind == "mask":
            items.append(draw(st.lists(st.booleans(), min_size=size, max_size=size)) or slice(None))
        elif kind == "masks" and dim + 1 < len(shape):
            flags = [draw(st.booleans()) for _ in range(size * shape[dim + 1])]
            items.append(torch.tensor(flags, dtype=torch.bool).reshape(size, shape[dim + 1]))
            dim += 1
        else:
            bound = st.none() | st.integers(-7, 7)
            items.append(slice(draw(bound), draw(bound), draw(st.none() | st.integers(1, 3))))
        dim += 1
    if draw(st.booleans()):
        items.insert(draw(st.integers(0, len(items))), ...)
    if len(items) == 1 and not isinstance(items[0], list) and draw(st.booleans()):
        return shape, items[0]
    return shape, tuple(items)


@given(indexed(), st.sampled_from(["U8", "BF16", "F32", "C64"]))
def test_any_index_of_any_shape_means_what_it_means_in_torch(made, dtype):
    shape, index = made
    found, _, whole = opened(dtype, shape)
    with found, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            theirs = whole[index]
        except IndexError:
            with pytest.raises(IndexError):
                found.get_slice("t")[index]
        else:
            same(found.get_slice("t")[index], theirs)


@pytest.mark.parametrize("way_of_reading", ["python", "cpp"])
@pytest.mark.parametrize(
    "index", [slice(10, 90, 3), (..., slice(100, 200)), (slice(5, 50), [3, 700, 999]), [0, 99, 50]]
)
def test_files_are_sliced_by_every_engine(tmp_path, way_of_reading, index):
    (tmp_path / "w").write_bytes(checkpoint({"odd": entry("U8", [3]), "t": entry("I16", [100, 1000])}))
    with open_checkpoint(tmp_path / "w", engine=way_of_reading) as found:
        same(found.get_slice("t")[index], found.get_tensor("t")[index])


def test_the_indexing_of_safetensors_is_taken(tmp_path):
    (tmp_path / "w").write_bytes(checkpoint({"t": entry("F32", [6, 8])}))
    with open_checkpoint(tmp_path / "w") as found, safe_open(tmp_path / "w", "pt") as file:
        ours, theirs = found.get_slice("t"), file.get_slice("t")
        assert (ours.get_shape(), ours.get_dtype()) == (theirs.get_shape(), theirs.get_dtype())
        for index in (slice(2, 4), (slice(None), slice(1, 3)), 3, -1, ..., (1, 2), (slice(None), 5), [0, 3], (..., 2)):
            same(ours[index], theirs[index].contiguous())


@pytest.mark.parametrize("dtype", ["I8", "F8_E4M3", "F8_E8M0", "F16", "F64", "U64"])
def test_every_type_can_be_sliced(dtype):
    found, _, whole = opened(dtype, [6, 4])
    with found:
        same(found.get_slice("t")[1:5:2, 1:], whole[1:5:2, 1:].contiguous())


def test_packed_types_are_sliced_as_torch_packs_them():
    found, _, whole = opened("F4", [6, 8])
    with found:
        part = found.get_slice("t")
        assert part.get_shape() == [6, 8]
        # By its bytes: torch 2.9 copies no strided memory of this type.
        same(part[2:4, 1:3], whole.view(torch.uint8)[2:4, 1:3].contiguous().view(whole.dtype))


def test_a_slice_is_memory_of_its_own():
    found, _, whole = opened("I32", [4, 4])
    with found:
        part = found.get_slice("t")
        first = part[0]
        first.zero_()
        assert torch.equal(part[0], whole[0])


@pytest.mark.parametrize(
    ("index", "elements"),
    [
        (slice(None), 1000 * 64),
        (3, 64),
        (slice(10, 20), 640),
        (slice(-1, None), 64),
        ((5, slice(2, 7)), 5),
        ((9, 9), 1),
    ],
)
def test_consecutive_elements_are_read_exactly(index, elements):
    found, file, whole = opened("F32", [1000, 64])
    with found:
        same(found.get_slice("t")[index], whole[index])
    assert file.bytes_read == elements * 4


@pytest.mark.parametrize("index", [slice(0, 0), [], (slice(None), slice(5, 5)), torch.zeros(8, dtype=torch.bool)])
def test_nothing_is_read_for_nothing(index):
    found, file, whole = opened("F32", [8, 64])
    with found:
        same(found.get_slice("t")[index], whole[index])
    assert file.bytes_read == 0


@pytest.mark.parametrize(
    "index", [[700, 2, 3, 2], torch.tensor([[2, 3], [700, 700]]), np.isin(np.arange(1000), [2, 3, 700])]
)
def test_of_the_rows_in_a_list_each_is_read_once(index):
    found, file, whole = opened("F32", [1000, 64])
    with found:
        same(found.get_slice("t")[index], whole[index])
    assert file.bytes_read == 3 * 64 * 4


def test_elements_far_apart_are_read_without_what_lies_between():
    found, file, whole = opened("F32", [8, 2 * GAP_BYTES // 4])
    with found:
        same(found.get_slice("t")[:, 5:9], whole[:, 5:9].contiguous())
        assert file.bytes_read == 8 * 4 * 4
        file.reads.clear()
        same(found.get_slice("t")[::3], whole[::3].contiguous())
    assert file.bytes_read == 3 * 2 * GAP_BYTES


def test_elements_close_together_are_read_in_one_go():
    found, file, whole = opened("F32", [1000, 64])
    with found:
        same(found.get_slice("t")[100:900, :2], whole[100:900, :2].contiguous())
    assert len(file.reads) == 1
    assert file.bytes_read == 799 * 64 * 4 + 2 * 4


@given(indexed())
def test_no_byte_outside_the_wanted_span_is_read(made):
    """Whatever the index: nothing before the first and nothing after the last wanted byte, and no byte twice."""
    shape, index = made
    found, file, whole = opened("I32", shape)
    numbers = torch.arange(whole.numel()).reshape(whole.shape)
    with found, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            wanted = numbers[index].flatten().tolist()
        except IndexError:
            return
        found.get_slice("t")[index]
        begin = found.info("t").offset
    assert file.bytes_read <= whole.numel() * 4
    items = index if isinstance(index, tuple) else (index,)
    of_columns = any(isinstance(item, list | torch.Tensor) for item in items[1:])
    if of_columns or any(isinstance(item, torch.Tensor) and item.dim() > 1 for item in items):
        return  # lists of columns read the range that they span
    for offset, nbytes in file.reads:
        assert wanted, "bytes were read for an empty index"
        assert begin + 4 * min(wanted) <= offset
        assert offset + nbytes <= begin + 4 * (max(wanted) + 1)
    spans = sorted((offset, offset + nbytes) for offset, nbytes in file.reads)
    assert all(one[1] <= other[0] for one, other in itertools.pairwise(spans))


def test_columns_in_a_list_are_read_in_one_go():
    found, file, whole = opened("F32", [100, 64])
    with found:
        same(found.get_slice("t")[:, [60, 3, 20]], whole[:, [60, 3, 20]])
        assert file.bytes_read <= whole.nbytes
    found, file, whole = opened("F32", [3, GAP_BYTES])
    with found:
        same(found.get_slice("t")[:, [60, 3]], whole[:, [60, 3]])
        assert file.bytes_read == 3 * 2 * 4


def test_memory_that_cannot_be_had_is_a_checkpoint_error():
    nbytes = 1 << 50
    text = f'{{"huge":{{"dtype":"U8","shape":[{nbytes}],"data_offsets":[0,{nbytes}]}}}}'.encode()
    file = FakeFile(encode(text, bytes(1 << 20)), size=8 + len(text) + nbytes)
    with open_fake(file) as found:
        for read in (lambda: found.get_tensor("huge"), lambda: list(found.tensors())):
            with pytest.raises(CheckpointError, match="no memory"):
                read()
