"""Errors: one sentence with file, byte, cause and advice, that survives the way to another process."""

import errno
import os
import pickle

import pytest

from engine_loader import open_checkpoint
from engine_loader.dcp import FileSystemReader
from engine_loader.errors import CheckpointError, EngineLoaderError, TensorNotFoundError, TransferError
from engine_loader.failures import deadline_passed, end_of_file, io_error


def test_a_message_has_file_byte_cause_and_advice():
    error = CheckpointError("the data is cut short", file="/m/w", offset=5, hint="copy it again")
    assert str(error) == "/m/w: at byte 5: the data is cut short (copy it again)"
    assert str(CheckpointError("no weights")) == "no weights"


@pytest.mark.parametrize(
    "error",
    [
        CheckpointError("wrong", file="/m/w", offset=5, hint="h"),
        TensorNotFoundError.among("w.wieght", ["w.weight"], "/m/w"),
        io_error("/m/w", 7, errno.EIO, tries=5),
        io_error("/m/w", None, errno.ENOENT),
        io_error("/m/w", None, errno.EACCES),
        end_of_file("/m/w", 5, 10),
        deadline_passed("/m/w", 5, 30),
    ],
)
def test_an_error_arrives_whole_in_another_process(error):
    copied = pickle.loads(pickle.dumps(error))
    assert type(copied) is type(error)
    assert str(copied) == str(error)
    assert vars(copied) == vars(error)


def test_the_cause_of_an_io_error_can_be_asked_for():
    error = pickle.loads(pickle.dumps(io_error("/m/w", 7, errno.ESTALE)))
    assert isinstance(error, TransferError)
    assert isinstance(error, EngineLoaderError)
    assert error.errno == errno.ESTALE
    assert "[ESTALE]" in str(error)


@pytest.mark.parametrize("path", ["/m/\udcff", "/m/a\nb", "/m/a\0b", "/m/\x1b[31m"])
def test_a_path_that_cannot_be_printed_is_escaped(path):
    text = str(CheckpointError("wrong", file=path))
    assert text.isprintable()
    assert text.encode()
    assert CheckpointError("wrong", file=path).file == path


def test_an_unknown_name_is_a_key_error_that_reads_as_a_sentence():
    error = TensorNotFoundError.among("a.b", ["a.c", "x"], None)
    assert isinstance(error, KeyError)
    assert str(error) == "no tensor named 'a.b' (did you mean 'a.c'?)"


@pytest.mark.parametrize(
    ("code", "kind"),
    [(errno.ENOENT, FileNotFoundError), (errno.EACCES, PermissionError), (errno.EIO, OSError), (errno.EMFILE, OSError)],
)
def test_what_the_system_refused_is_an_oserror_as_well(code, kind):
    error = pickle.loads(pickle.dumps(io_error("/m/w", 7, code)))
    assert isinstance(error, TransferError)
    assert isinstance(error, kind)
    assert (error.errno, error.strerror, error.filename) == (code, os.strerror(code), "/m/w")
    assert str(error).startswith(f"/m/w: at byte 7: could not read: {os.strerror(code)}")


def test_what_a_file_lacks_is_no_oserror():
    for error in (end_of_file("/m/w", 5, 10), CheckpointError("wrong", file="/m/w"), io_error("/m/w", 0, None)):
        assert not isinstance(error, OSError)


def test_files_that_cannot_be_opened(tmp_path):
    with pytest.raises(FileNotFoundError) as missing:
        open_checkpoint(tmp_path / "missing.safetensors")
    assert (missing.value.errno, missing.value.filename) == (errno.ENOENT, str(tmp_path / "missing.safetensors"))
    assert isinstance(missing.value, CheckpointError)
    with pytest.raises(FileNotFoundError):
        FileSystemReader(tmp_path).read_metadata()
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(NotADirectoryError):
        open_checkpoint(tmp_path / "file" / "model.safetensors")
