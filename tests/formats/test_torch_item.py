"""Where a tensor lies in an item of ``torch.save``: known without reading all of it, and never wrongly."""

import io
import zipfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_loader.formats import torch_item
from engine_loader.formats.torch_item import ENDS_BYTES, TensorLayout, item_layout


def saved(tensor: torch.Tensor) -> bytes:
    stream = io.BytesIO()
    torch.save(tensor, stream)
    return stream.getvalue()


def layout_of(item: bytes) -> TensorLayout | None:
    return item_layout(item[:ENDS_BYTES], item[-ENDS_BYTES:], len(item))


def alone(item: bytes) -> TensorLayout | None:
    """What is said of an item that is the first of its kind."""
    torch_item._seen.clear()
    return layout_of(item)


@pytest.mark.parametrize("shape", [(), (3,), (700, 40), (2, 3, 4, 5)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8, torch.bool, torch.float8_e4m3fn])
def test_the_bytes_are_where_it_says(shape, dtype):
    for seed in range(3):
        torch.manual_seed(seed)
        tensor = torch.randint(0, 2, shape).to(dtype)
        item = saved(tensor)
        layout = layout_of(item)
        assert layout is not None
        assert (layout.dtype, layout.shape, layout.strides) == (str(dtype)[6:], tensor.shape, tensor.stride())
        there = item[layout.offset : layout.offset + tensor.nbytes]
        assert there == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def test_views_of_one_length_are_told_apart():
    base = torch.randn(64, 64)
    views = [base, base.t(), base.view(32, 128), base.flip(0).contiguous()]
    items = [saved(view) for view in views]
    assert len({len(item) for item in items}) < len(items)
    for _ in range(2):
        for view, item in zip(views, items, strict=True):
            layout = layout_of(item)
            assert layout is not None
            assert (layout.shape, layout.strides) == (view.shape, view.stride())


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, ENDS_BYTES - 1), st.booleans(), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_damaged_item_is_not_taken_for_the_one_before(changes):
    first, second = saved(torch.zeros(50, 60)), bytearray(saved(torch.ones(50, 60)))
    for place, from_end, value in changes:
        second[-1 - place if from_end else place] = value
    expected = alone(bytes(second))
    assert alone(first) is not None
    assert layout_of(bytes(second)) == expected


def test_what_the_names_in_the_directory_say_counts():
    """Each byte of the directory, and of what is before the tensor."""
    item = saved(torch.zeros(50, 60))
    with zipfile.ZipFile(io.BytesIO(item)) as archive:
        directory = archive.start_dir
    layout = alone(item)
    assert layout is not None
    for place in [*range(0, layout.offset), *range(directory, len(item))]:
        damaged = bytearray(item)
        damaged[place] ^= 1
        expected = alone(bytes(damaged))
        alone(item)
        assert layout_of(bytes(damaged)) == expected, place
