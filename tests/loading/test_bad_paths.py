"""Paths that lead to no checkpoint: at once, an error that says what is there instead, and what to do."""

import os
import socket
import tempfile
from pathlib import Path

import pytest

from engine_loader import CheckpointError, open_checkpoint
from engine_loader.formats.hf_index import INDEX_NAME
from tests.support.checkpoints import checkpoint, entry, index
from tests.support.children import NOBODY, in_child
from tests.support.resources import left_open, open_resources

GOOD = checkpoint({"a": entry("U8", [4])})


def refusal(path: object) -> CheckpointError:
    before = open_resources()
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert left_open(before) == []
    str(caught.value).encode()  # a log must be able to print it
    assert str(caught.value).isprintable()
    return caught.value


def test_nothing_there(tmp_path):
    error = refusal(tmp_path / "missing.safetensors")
    assert str(error).startswith(f"{tmp_path}/missing.safetensors: could not open the file: No such file")
    assert "check the path" in error.hint


@pytest.mark.parametrize(
    "path", ["", " ", "no/such/directory/", "model.safetensors\0", "a\nb", "x" * 300, "\udcff", "\ud800"]
)
def test_a_path_that_can_be_none(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "could not open the file" in refusal(path).message
    assert "could not open the file" in refusal([path]).message


def test_a_path_below_a_file(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    assert "a part of the path is a file" in refusal(tmp_path / "file" / "model.safetensors").hint


def test_links_that_lead_nowhere(tmp_path):
    (tmp_path / "loop.safetensors").symlink_to("loop.safetensors")
    (tmp_path / "dangling.safetensors").symlink_to("gone")
    assert "symbolic links" in refusal(tmp_path / "loop.safetensors").hint
    assert "No such file" in refusal(tmp_path / "dangling.safetensors").message
    assert "dangling.safetensors: could not open" in str(refusal(tmp_path))


def test_a_name_that_is_not_text_is_a_name(tmp_path):
    path = os.fsdecode(bytes(tmp_path) + b"/m\xff.safetensors")
    Path(path).write_bytes(GOOD)
    with open_checkpoint(path) as opened:
        assert opened.get_tensor("a").shape == (4,)
    Path(path).write_bytes(GOOD[:-1])
    assert "m\\udcff.safetensors: the data is cut short" in str(refusal(path))
    assert "m\\udcff.safetensors: the data is cut short" in str(refusal(tmp_path))


def test_a_directory_where_a_file_is_meant(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    assert "this is a directory where a file is meant" in refusal([tmp_path / "model.safetensors"]).message
    (tmp_path / INDEX_NAME).write_bytes(index({"a": "sub/model.safetensors"}))
    (tmp_path / "sub" / "model.safetensors").mkdir(parents=True)
    assert "this is a directory where a file is meant" in refusal(tmp_path).message


def test_a_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "w.safetensors")
    assert "not a regular file" in refusal(tmp_path / "w.safetensors").message
    assert "not a regular file" in refusal(tmp_path).message


def test_a_socket(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("w.safetensors")
        assert "this is a socket or a device where a file is meant" in refusal("w.safetensors").message


@pytest.mark.parametrize("path", ["/dev/null", "/dev/zero", "/dev/tty"])
def test_a_device(path):
    assert "where a file is meant" in refusal(path).message or "could not open" in refusal(path).message


@pytest.mark.parametrize(
    ("names", "hint"),
    [
        ([], "it is empty"),
        (["pytorch_model.bin", "config.json"], "write them as safetensors: engine-loader convert"),
        (["model.pt"], "write them as safetensors: engine-loader convert"),
        (["config.json", "tokenizer.json"], "it has config.json, tokenizer.json"),
        ([f"{number}.txt" for number in range(9)], "it has 0.txt, 1.txt, 2.txt, 3.txt, 4.txt, …"),
    ],
)
def test_a_directory_without_weights(tmp_path, names, hint):
    for name in names:
        (tmp_path / name).write_bytes(b"")
    error = refusal(tmp_path)
    assert str(error).startswith(f"{tmp_path}: no .safetensors file in this directory")
    assert hint in error.hint


def test_a_directory_of_directories_says_which(tmp_path):
    (tmp_path / "fp8").mkdir()
    assert "it has no files, but the directories 'fp8'" in refusal(tmp_path).hint


def test_files_in_memory_that_are_not_there():
    files = {"/m/a.safetensors": GOOD}
    for path in ("/x", "/m/b.safetensors", "/m/a.safetensors/b", "/M"):
        with pytest.raises(CheckpointError, match="there is no such file in memory"):
            open_checkpoint(path, files=files)
    with pytest.raises(CheckpointError, match="this is a directory where a file is meant"):
        open_checkpoint(["/m"], files=files)
    with pytest.raises(CheckpointError, match="there is no such file in memory"):
        open_checkpoint("/m", backend="memory")


@pytest.fixture
def open_directory(tmp_path):
    """A directory that every user can enter; pytest's own ones are the owner's only."""
    root = Path(tempfile.gettempdir()).resolve()
    modes = {path: path.stat().st_mode for path in (tmp_path, *tmp_path.parents) if root in path.resolve().parents}
    for path, mode in modes.items():
        path.chmod(mode | 0o055)
    yield tmp_path
    for path, mode in modes.items():
        path.chmod(mode)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_no_permission_says_whom_to_ask(open_directory):
    closed_file, closed_directory = open_directory / "w.safetensors", open_directory / "d"
    closed_file.write_bytes(GOOD)
    closed_file.chmod(0)
    closed_directory.mkdir()
    (closed_directory / "w.safetensors").write_bytes(GOOD)
    closed_directory.chmod(0o700)

    def messages() -> list[str]:
        found = []
        for path in (closed_file, [closed_file], closed_directory, closed_directory / "w.safetensors", open_directory):
            try:
                open_checkpoint(path)
            except CheckpointError as error:
                found.append(str(error))
        return found

    told = in_child(messages, user=NOBODY)
    assert len(told) == 5
    assert all("Permission denied [EACCES] (no permission: check owner and mode" in message for message in told)
    assert told[0].startswith(f"{closed_file}: could not open the file")
    assert told[2].startswith(f"{closed_directory}: could not list the directory")
    with open_checkpoint(closed_file) as opened:
        assert len(opened) == 1
