"""Whatever bytes a file has: a CheckpointError that names it, or tensors that hold exactly its bytes."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_loader import Checkpoint, CheckpointError, open_checkpoint
from engine_loader.formats.dtypes import DTYPE_BITS
from engine_loader.formats.hf_index import INDEX_NAME
from tests.support.checkpoints import checkpoint, entry, index, noise, tensor_bytes
from tests.support.resources import left_open, open_resources


def check_everything(opened: Checkpoint, files: dict[str, bytes]) -> None:
    """Every way of reading gives the bytes that the headers point at."""
    for name in opened:
        info = opened.info(name)
        content = files[os.path.normpath(info.file)][info.offset : info.offset + info.nbytes]
        try:
            tensor = opened.get_tensor(name)
        except CheckpointError as error:
            assert "cannot be a torch tensor" in str(error)  # numbers of less than a byte in rows of no whole bytes
            continue
        assert tensor_bytes(tensor) == content
        assert tensor_bytes(next(opened.tensors([name]))[1]) == content
        assert tensor_bytes(opened.get_slice(name)[...]) == content


def judge(path: object, files: dict[str, bytes]) -> None:
    try:
        with open_checkpoint(path, files=files, threads=1) as opened:
            check_everything(opened, files)
    except CheckpointError as error:
        assert error.file is not None
        assert str(error).isprintable()


@given(st.binary(max_size=200))
def test_any_bytes(content):
    judge("/w", {"/w": content})


@given(st.integers(0, 60) | st.integers(0, 2**64 - 1), st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_any_length_and_any_header(length, rest):
    judge("/w", {"/w": length.to_bytes(8, "little") + rest})


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A valid file with bytes changed, inserted, removed, repeated or cut."""
    types = draw(st.lists(st.sampled_from(list(DTYPE_BITS)), max_size=4))
    tensors = {f"t{n}": entry(dtype, [draw(st.sampled_from([0, 1, 3])), 8], n) for n, dtype in enumerate(types)}
    content = checkpoint(tensors, draw(st.none() | st.just({"format": "pt"})))
    for _ in range(draw(st.integers(1, 4))):
        begin = draw(st.integers(0, len(content)))
        end = min(len(content), begin + draw(st.integers(0, 20)))
        piece = draw(st.sampled_from([b"", content[begin:end] * 2]) | st.binary(max_size=8))
        content = content[:begin] + piece + content[end:]
    return content


@given(damaged())
def test_any_damage_to_a_valid_file(content):
    judge("/w", {"/w": content})


@given(damaged(), st.sampled_from(["python", "cpp"]))
def test_any_damage_to_a_file_on_disk(tmp_path_factory, content, engine):
    path = str(tmp_path_factory.getbasetemp() / "damaged.safetensors")
    with open(path, "wb") as file:
        file.write(content)
    before = open_resources()
    try:
        with open_checkpoint(path, engine=engine, threads=1) as opened:
            check_everything(opened, {path: content})
    except CheckpointError as error:
        assert error.file == path
    assert left_open(before) == []


@given(st.data())
def test_any_directory_of_shards_and_indexes(data):
    files = {}
    shards = data.draw(st.lists(st.sampled_from(["1.safetensors", "2.safetensors", "10.safetensors"]), unique=True))
    for number, shard in enumerate(shards):
        names = data.draw(st.lists(st.sampled_from("abcd"), unique=True))
        files[f"/m/{shard}"] = checkpoint({name: entry("U8", [5], number) for name in names})
    names = st.sampled_from([*"abcd", "x"])
    targets = st.sampled_from(
        ["1.safetensors", "2.safetensors", "./1.safetensors", "../m/2.safetensors", "9", "/m/1.safetensors"]
    )
    if data.draw(st.booleans()):
        files[f"/m/{INDEX_NAME}"] = index(data.draw(st.dictionaries(names, targets)))
    judge("/m", files)


@pytest.mark.parametrize("nbytes", [1, 7, 8, 9, 4096, 1 << 20])
def test_noise_of_any_length(nbytes):
    judge("/w", {"/w": noise(nbytes)})
    judge("/w", {"/w": b"\0" * nbytes})
    judge("/w", {"/w": b"\xff" * nbytes})
