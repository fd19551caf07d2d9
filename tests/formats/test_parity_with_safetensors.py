"""Against the reference implementation: what safetensors refuses we refuse, what it reads we read alike.

The differences are deliberate, and all of them are listed here:

- A name that stands twice is an error. safetensors takes the last one, and nobody can say which was meant.
- An entry written as a list, or a dtype written as an object (``{"U8": null}``), is an error. They pass in safetensors
  by an accident of its JSON library; no other reader takes them.
- A shape with a zero whose other sizes give strides beyond 64 bits is an error. safetensors hands out a tensor with
  wrapped strides.
- Fields that the format does not know may be nested deeper than 127 levels. Nobody reads them.
- F6_E2M3 and F6_E3M2, for which torch has no type, are handed out as packed bytes; safetensors opens the file, but not
  the tensor.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from engine_loader import CheckpointError, open_checkpoint
from engine_loader.formats.dtypes import DTYPE_BITS
from tests.support.checkpoints import checkpoint, encode, entry, noise, tensor_bytes

Tensors = dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]
STRICTER = re.compile(r"twice|the entry of .* is not an object|unknown dtype \{|too large")
LAXER = re.compile("recursion limit exceeded")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parity") / "model.safetensors"


def shown(tensor: torch.Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    return tensor.dtype, tuple(tensor.shape), tensor_bytes(tensor)


def read_by_reference(path: Path) -> tuple[Tensors, dict[str, str]] | str:
    """Tensors and metadata; the ones torch has no type for are left out. A text is the refusal."""
    try:
        with safe_open(path, "pt") as file:
            found = {}
            for name in list(file.keys()):
                try:
                    found[name] = shown(file.get_tensor(name))
                except SafetensorError as error:
                    assert re.search("not understood: F6|f4_x2 dtype requires", str(error))
                except (TypeError, RuntimeError) as error:
                    assert re.search("Overflow|overflow", str(error))
            return found, file.metadata() or {}
    except SafetensorError as error:
        return str(error)


def read_by_us(path: Path) -> tuple[Tensors, dict[str, str]] | str:
    try:
        with open_checkpoint(path, threads=1) as file:
            found = {}
            for name in file:
                if file.info(name).dtype.startswith("F6_"):
                    continue
                try:
                    found[name] = shown(file.get_tensor(name))
                except CheckpointError as error:
                    assert "cannot be a torch tensor" in str(error)
            return found, file.metadata()
    except CheckpointError as error:
        assert str(path) in str(error)
        return error.message


def compare(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    theirs, ours = read_by_reference(path), read_by_us(path)
    if isinstance(theirs, str):
        assert isinstance(ours, str) or LAXER.search(theirs), f"we accept what safetensors refuses: {theirs}"
    elif isinstance(ours, str):
        assert STRICTER.search(ours), f"we refuse what safetensors accepts: {ours}"
    else:
        assert ours == theirs


names = st.text(max_size=3)
sizes = st.sampled_from([0, 1, 2, 3, 4, 8])
numbers = st.integers(-2, 9) | st.sampled_from([2**31, 2**63 - 1, 2**63, 2**64, 10**30, 10**400, -0.0, 1e300, 2.0])
scalars = (
    st.none() | st.booleans() | numbers | st.floats() | st.text(max_size=3) | st.sampled_from([*DTYPE_BITS, "\ud800"])
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=2), max_leaves=5
)


@st.composite
def headers(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    """A right header, and how many bytes of data it describes."""
    header: dict[str, Any] = {}
    offset = 0
    for name in draw(st.lists(names, max_size=4, unique=True)):
        dtype, shape = draw(st.sampled_from(list(DTYPE_BITS))), draw(st.lists(sizes, max_size=3))
        end = offset + len(entry(dtype, shape)[2])
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    if draw(st.booleans()):
        header["__metadata__"] = draw(st.dictionaries(names, names, max_size=2))
    return header, offset


@given(headers())
def test_right_files_are_read_alike(path, made):
    header, nbytes = made
    compare(path, encode(header, noise(nbytes)))


@given(headers(), st.data())
def test_files_with_one_wrong_value_are_judged_alike(path, made, data):
    header, nbytes = made
    key = data.draw(st.sampled_from([*header, "__metadata__", "more"]))
    entry_ = header.get(key)
    if isinstance(entry_, dict) and data.draw(st.booleans()):
        field = data.draw(st.sampled_from([*entry_, "more"]))
        inner = entry_.get(field)
        if isinstance(inner, list) and inner and data.draw(st.booleans()):
            inner[data.draw(st.integers(0, len(inner) - 1))] = data.draw(values)
        else:
            entry_[field] = data.draw(values)
    else:
        header[key] = data.draw(values)
    more = data.draw(st.sampled_from([0, 0, 0, -1, 1, 8]))
    compare(path, encode(header, noise(max(0, nbytes + more))))


PIECES = [
    '"',
    "{",
    "}",
    "[",
    "]",
    ",",
    ":",
    "0",
    "1",
    "9",
    "-",
    ".",
    "e5",
    "null",
    "true",
    "NaN",
    " ",
    "\n",
    "\\",
    "\\ud800",
    "a",
    "\x01",
]


@given(headers(), st.data())
def test_texts_with_a_slip_are_judged_alike(path, made, data):
    header, nbytes = made
    text = json.dumps(header, ensure_ascii=False)
    for _ in range(data.draw(st.integers(1, 3))):
        begin = data.draw(st.integers(0, len(text)))
        end = begin + data.draw(st.integers(0, 2))
        text = text[:begin] + data.draw(st.sampled_from(["", *PIECES])) + text[end:]
    compare(path, encode(text, noise(nbytes)))


@given(headers(), st.data())
def test_files_with_damaged_bytes_are_judged_alike(path, made, data):
    header, nbytes = made
    content = bytearray(encode(header, noise(nbytes)))
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    del content[data.draw(st.integers(0, len(content)) | st.just(len(content))) :]
    compare(path, bytes(content))


@given(st.binary(max_size=64))
def test_any_bytes_are_judged_alike(path, content):
    compare(path, content)


@pytest.mark.parametrize("dtype", list(DTYPE_BITS))
@pytest.mark.parametrize("shape", [[], [0], [8], [3, 0, 4], [2, 3, 4], [1] * 70])
def test_every_type_is_read_alike(path, dtype, shape):
    size = entry(dtype, shape)
    if len(size[2]) * 8 < DTYPE_BITS[dtype]:  # a scalar of less than a byte is no whole byte
        shape = [*shape[:-1], 0]
        size = entry(dtype, shape)
    compare(path, checkpoint({"odd": entry("U8", [3]), "t": size}))


def test_our_list_of_types_is_that_of_safetensors(path):
    path.write_bytes(encode({"t": {"dtype": "?", "shape": [], "data_offsets": [0, 0]}}))
    refusal = read_by_reference(path)
    assert isinstance(refusal, str)
    assert set(re.findall("`([A-Z0-9_]+)`", refusal.partition("expected one of")[2])) == set(DTYPE_BITS)
