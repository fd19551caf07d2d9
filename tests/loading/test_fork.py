"""A child process cannot use what its parent opened: it is told so at once, and does the parent no harm."""

import os
import threading
import time
from pathlib import Path

import pytest

from engine_loader import CheckpointError, open_checkpoint
from tests.support.checkpoints import checkpoint, entry, tensor_bytes
from tests.support.children import in_child

TENSORS = {f"t{number}": entry("U8", [300_000], number) for number in range(20)}
OPTIONS = {"block_bytes": "64KiB", "buffer_bytes": "1MiB"}


@pytest.fixture
def path(tmp_path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(checkpoint(TENSORS))
    return path


def test_a_child_that_reads_on_is_told_to_open_again(path, way):
    with open_checkpoint(path, **way, **OPTIONS) as opened:
        pairs = opened.tensors()
        next(pairs)

        def messages() -> list[str]:
            found = []
            for use in (lambda: opened.get_tensor("t1"), lambda: list(opened.tensors()), lambda: list(pairs)):
                try:
                    use()
                except CheckpointError as error:
                    found.append(str(error))
            pairs.close()
            opened.close()
            return found

        told = in_child(messages)
        # Mapped pages need no threads: streams work on in the child.
        refused = 1 if way.get("read_mode") == "mapped" else 3
        assert [message.partition(" (")[0] for message in told] == ["reader threads do not survive a fork"] * refused
        assert all("open the checkpoint again here" in message for message in told)
        rest = {name: tensor_bytes(tensor) for name, tensor in pairs}
        assert rest == {name: content for name, (_, _, content) in list(TENSORS.items())[1:]}


def test_a_child_may_open_the_checkpoint_again(path, way):
    with open_checkpoint(path, **way, **OPTIONS) as opened:
        opened.get_tensor("t1")

        def read_again() -> bool:
            with open_checkpoint(path, **way, **OPTIONS) as again:
                return all(tensor_bytes(tensor) == TENSORS[name][2] for name, tensor in again.tensors())

        assert in_child(read_again)


def test_a_checkpoint_that_nothing_was_read_of_can_be_used_in_the_child(path, way):
    with open_checkpoint(path, **way) as opened:
        assert in_child(lambda: tensor_bytes(opened.get_tensor("t3"))) == TENSORS["t3"][2]
        assert tensor_bytes(opened.get_tensor("t3")) == TENSORS["t3"][2]


def test_forks_in_the_midst_of_reading_do_not_hang(path, way):
    """Whatever lock a reading thread held at the fork, the child must not wait for it."""
    with open_checkpoint(path, **way, **OPTIONS) as opened:
        stop = threading.Event()

        def read() -> None:
            while not stop.is_set():
                for _ in opened.tensors():
                    pass

        threads = [threading.Thread(target=read) for _ in range(2)]
        for thread in threads:
            thread.start()

        def message() -> str:
            try:
                opened.get_tensor("t1")
            except CheckpointError as error:
                return str(error)
            finally:
                opened.close()
            return "no error"

        try:
            time.sleep(0.05)
            for _ in range(10):
                assert "reader threads do not survive a fork" in in_child(message)
        finally:
            stop.set()
            for thread in threads:
                thread.join()


def test_a_child_that_just_ends_leaves_the_parent_its_files(path, way):
    with open_checkpoint(path, **way) as opened:
        opened.get_tensor("t1")
        assert in_child(os.getpid) != os.getpid()
        assert tensor_bytes(opened.get_tensor("t2")) == TENSORS["t2"][2]
