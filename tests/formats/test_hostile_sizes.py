"""A few bytes of a checkpoint ask for no more time and memory than a few bytes are worth."""

import io
import pickle
import zipfile

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from engine_loader import CheckpointError
from engine_loader.formats.dcp_metadata import parse_metadata
from engine_loader.loading.training.torch_load import load_item
from tests.fuzzing.limits import within_limits

parse_metadata(pickle.dumps(Metadata({}, None, {})), "f")  # imports what it needs, before the limits of the children


def metadata(planner_data: object, tensors: dict[str, object] | None = None) -> Metadata:
    return Metadata(tensors or {}, planner_data, {MetadataIndex("a", [0, 0]): _StorageInfo("x", 0, 1)})


def refused(content: bytes, told: str) -> None:
    assert told in within_limits(lambda: parse_metadata(content, "f"))


def nested_pairs(levels: int, put: bool) -> bytes:
    """A tuple of twice the tuple before, and so on."""
    content = b"K\x01K\x02\x86" + (b"q\0" if put else b"\x94")
    for level in range(levels):
        content += b"h%ch%c\x86" % (level, level) + (b"q%c" % (level + 1) if put else b"\x94")
    return content


@pytest.mark.parametrize("put", [True, False])
@pytest.mark.parametrize(
    "around",
    [b"(%bd.", b"}%bK\x01s.", b"}(%bK\x01u.", b"\x8f(%b\x90.", b"(%b\x91."],
    ids=["DICT", "SETITEM", "SETITEMS", "ADDITEMS", "FROZENSET"],
)
def test_nested_pairs_that_are_hashed_take_no_time(around, put):
    pairs = nested_pairs(60, put) + (b"K\x01" if around.endswith(b"d.") else b"")
    refused(b"\x80\x04" + around % pairs, "f: the metadata")


def test_nested_pairs_as_arguments_and_states_are_not_kept_for_others():
    level = b"(h%ch%cK\x01h%cK\x01t\x94b"
    name = b"\x8c\x25torch.distributed.checkpoint.metadata\x8c\x10TensorProperties\x93)\x81"
    content = b"\x80\x04}(" + name + b"(K\x01K\x01K\x01K\x01K\x01t\x94b0"
    for number in range(60):
        content += name + level % (number, number, number) + b"0"
    refused(content + b"h\x3cK\x01u.", "f: the metadata")


@pytest.mark.parametrize("key", [((1, 2), (3, 4)), frozenset({(("a",),)})])
def test_a_key_of_nested_tuples_is_refused(key):
    with pytest.raises(CheckpointError, match="which is not a short tuple of plain values"):
        parse_metadata(pickle.dumps(metadata({key: 1})), "f")


def test_what_planners_store_is_unchanged():
    deep = ((1, ("a", [2, ()])), {3}, frozenset({4, "x"}), {("a", 5): (-1, 2.5, 2**40, None, True)}, (7,) * 9)
    for protocol in (4, 5):
        assert parse_metadata(pickle.dumps(metadata(deep), protocol), "f").planner_data == deep


@pytest.mark.parametrize("dims", range(12))
def test_sizes_of_any_number_of_dimensions_are_read(dims):
    size = torch.Size([3 + dims, *(1 for _ in range(dims))][:dims])
    chunk = ChunkStorageMetadata(torch.Size([0] * dims), size)
    tensors = {"a": TensorStorageMetadata(TensorProperties(torch.int8), size, [chunk])}
    for protocol in range(2, 6):
        found = parse_metadata(pickle.dumps(metadata(None, tensors), protocol), "f")
        assert found.state_dict_metadata == tensors


def test_a_list_of_chunks_that_many_tensors_share_is_refused():
    size = torch.Size([8192])
    chunks = [ChunkStorageMetadata(torch.Size([2 * at]), torch.Size([2])) for at in range(4096)]
    tensors = {str(number): TensorStorageMetadata(TensorProperties(torch.int8), size, chunks) for number in range(100)}
    content = pickle.dumps(metadata(None, tensors))
    refused(content, "more chunks than the file can hold")
    for number, tensor in enumerate(tensors.values()):
        tensor.chunks = list(map(ChunkStorageMetadata, *zip(*((c.offsets, c.sizes) for c in chunks), strict=True)))
        if number == 9:
            break
    few = dict(list(tensors.items())[:10])
    assert parse_metadata(pickle.dumps(metadata(None, few)), "f").state_dict_metadata == few


@pytest.mark.parametrize("opcode", [b"]", b"}", b"\x8f", b")\x85"])
def test_megabytes_of_empty_containers_are_refused(opcode):
    refused(b"\x80\x04" + opcode * (3_000_000 // len(opcode)) + b".", "more lists and tuples than the metadata")


@pytest.mark.parametrize("argument", [b"]\x94(" + b"K\x01" * 50_000 + b"e", b"X\x50\xc3\0\0" + b"a" * 50_000 + b"\x94"])
def test_a_call_does_not_copy_what_is_long(argument):
    size = b"\x8c\x05torch\x8c\x04Size\x93\x94"
    content = b"\x80\x04" + size + argument + b"0(" + b"h\0h\1\x85R" * 1000 + b"l."
    refused(content, "it calls something with a value that DCP does not give")


@pytest.mark.parametrize(
    ("content", "told"),
    [(b"\x80\x04\x8b\xff\xff\0\0", "opcode 139"), (b"L" + b"9" * 4000 + b"L\n.", "number of"), (b"]2.", "opcode 50")],
)
def test_what_only_costs_time_is_refused(content, told):
    refused(content, told)


def test_an_item_of_compressed_zeros_is_refused_before_it_is_expanded():
    stream = io.BytesIO()
    torch.save(torch.zeros(36 << 20), stream)
    packed = io.BytesIO()
    with zipfile.ZipFile(stream) as saved, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in saved.namelist():
            archive.writestr(name, saved.read(name))
    assert len(packed.getvalue()) < 1 << 20
    told = within_limits(lambda: load_item(packed.getvalue(), "a", "f", 0), 64 << 20)
    assert "its records are compressed or overlap" in told


def test_an_item_as_torch_saves_it_is_read():
    stream = io.BytesIO()
    torch.save(torch.arange(9).reshape(3, 3).t(), stream)
    assert torch.equal(load_item(stream.getvalue(), "a", "f", 0), torch.arange(9).reshape(3, 3).t())
