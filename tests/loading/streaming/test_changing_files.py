"""Files that change while they are read: right data or an error, never a crash and never wrong bytes."""

import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine_loader import CheckpointError, open_checkpoint
from tests.support.checkpoints import Entry, checkpoint, entry, tensor_bytes
from tests.support.children import in_child

OPTIONS = {"block_bytes": "64KiB", "buffer_bytes": "1MiB"}
TENSORS: dict[str, Entry] = {f"t{number}": entry("U8", [100_000], number) for number in range(40)}
CONTENT = checkpoint(TENSORS)


@pytest.fixture
def path(tmp_path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(CONTENT)
    return path


def read_all(path: Path, way: dict[str, object], after: int, change: Callable[[], object]) -> tuple[list[str], str]:
    """Stream everything, with a ``change`` after so many tensors: those seen, and the error.

    What was handed out must be right, or the stream must end with an error.
    """
    with open_checkpoint(path, **way, **OPTIONS) as opened:
        right: list[str] = []
        wrong: list[str] = []
        if after == 0:
            change()
        try:
            for name, tensor in opened.tensors():
                right.append(name)
                if tensor_bytes(tensor) != TENSORS[name][2]:
                    wrong.append(name)
                if len(right) == after:
                    change()
        except CheckpointError as error:
            return right, str(error)
    assert not wrong
    return right, ""


@pytest.mark.parametrize("after", [0, 1, 20, 36])
@pytest.mark.parametrize("length", [0, 100, len(CONTENT) // 2 + 1, len(CONTENT) - 1])
def test_a_file_that_shrinks_is_an_error(path, way, after, length):
    right, message = in_child(lambda: read_all(path, way, after, lambda: os.truncate(path, length)))
    assert message.startswith(str(path))
    assert "ended" in message or "cut short" in message or "shorter" in message, message
    assert right == list(TENSORS)[: len(right)]


@pytest.mark.parametrize("use", ["get_tensor", "get_slice", "load_into"])
def test_a_file_that_shrinks_is_an_error_for_every_use(path, way, use):
    def read() -> str:
        with open_checkpoint(path, **way, **OPTIONS) as opened:
            os.truncate(path, len(CONTENT) // 2)
            calls: dict[str, Callable[[], object]] = {
                "get_tensor": lambda: opened.get_tensor("t39"),
                "get_slice": lambda: opened.get_slice("t39")[50_000:],
                "load_into": lambda: opened.load_into({"t39": torch.zeros(100_000, dtype=torch.uint8)}),
            }
            try:
                calls[use]()
            except CheckpointError as error:
                return str(error)
        return "no error"

    message = in_child(read)
    assert f"{path}: at byte" in message
    assert f"it had {len(CONTENT)} bytes when it was opened" in message
    assert "copy it again" in message


def test_a_file_that_is_replaced_is_read_to_its_end(path, way, tmp_path):
    def replace() -> None:
        (tmp_path / "new").write_bytes(checkpoint({"other": entry("U8", [10])}))
        os.replace(tmp_path / "new", path)

    assert in_child(lambda: read_all(path, way, 3, replace)) == (list(TENSORS), "")


def test_a_file_that_is_removed_is_read_to_its_end(path, way):
    assert in_child(lambda: read_all(path, way, 3, lambda: os.unlink(path))) == (list(TENSORS), "")


def test_a_file_that_grows_is_read_and_the_change_is_told(path, way, caplog):
    def grow() -> None:
        with open(path, "ab") as file:
            file.write(b"more")

    with caplog.at_level(logging.WARNING):
        assert read_all(path, way, 3, grow) == (list(TENSORS), "")
    assert f"{path} was modified while it was read" in caplog.text


def test_a_tensor_that_is_held_does_not_change_when_the_file_does(path, way, request):
    if way.get("read_mode") == "mapped":
        reason = "between hand-out and the next block, a mapped tensor shows what is written into its file in place"
        request.applymarker(pytest.mark.xfail(reason=reason, raises=AssertionError))
    with open_checkpoint(path, **way, **OPTIONS) as opened:
        pairs = opened.tensors()
        name, tensor = next(pairs)
        with open(path, "r+b") as file:
            file.write(b"\xee" * len(CONTENT))
        assert tensor_bytes(tensor) == TENSORS[name][2]


def test_a_shard_that_shrinks_before_it_is_opened_is_an_error(path):
    os.truncate(path, len(CONTENT) - 7)
    with pytest.raises(CheckpointError, match="the data is cut short"):
        open_checkpoint(path)


def kept_after_truncation(path: Path, way: dict[str, object]) -> bool:
    with open_checkpoint(path, **way, **OPTIONS) as opened:
        kept = dict(opened.tensors())
        os.truncate(path, 10)
        same_before = all(tensor_bytes(tensor) == TENSORS[name][2] for name, tensor in kept.items())
    return same_before and all(tensor_bytes(tensor) == TENSORS[name][2] for name, tensor in kept.items())


def test_tensors_that_are_kept_survive_the_end_of_their_file(path, way):
    """The kernel takes even private copies of mapped pages away when a file is cut short."""
    assert in_child(lambda: kept_after_truncation(path, way))
