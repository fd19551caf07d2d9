"""Each public class and function of the drop-ins is called as that of the package: names, order and defaults.

Packages that are installed here are asked; b10_transfer 0.4.1 and fastsafetensor_3fs_reader 0.3.3, which are not, are
recorded below."""

import inspect
import os
from collections.abc import Callable
from typing import Any

import pytest
import s3torchconnector
import s3torchconnector.dcp
import safetensors.torch
import torch.distributed.checkpoint as torch_dcp
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemBase
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

import engine_loader
from engine_loader import dcp, threefs
from engine_loader.compat import b10_transfer, safetensors_files
from engine_loader.compat.fastsafetensor_3fs_reader import reader_cpp, reader_py

REQUIRED = inspect.Parameter.empty
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_STARRED = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)

Recorded = list[tuple[str, Any]]
"""(name, default) of each parameter, in order."""


def parameters_of(function: Callable[..., Any]) -> Recorded:
    found = inspect.signature(function).parameters.values()
    return [(one.name, one.default) for one in found if one.kind not in _STARRED and one.name != "self"]


def problems(
    name: str, theirs: Recorded, ours: Callable[..., Any], keywords: frozenset[str] = frozenset()
) -> list[str]:
    """What a caller of theirs would notice. ``keywords``: parameters that are by name only there, too."""
    mine = [one for one in inspect.signature(ours).parameters.values() if one.name != "self"]
    places = [one.name for one in mine if one.kind in _POSITIONAL]
    by_name = {one.name: one for one in mine}
    found = []
    for place, (parameter, default) in enumerate(theirs):
        if parameter not in by_name:
            found.append(f"{name}: no {parameter}")
            continue
        if parameter not in keywords and (len(places) <= place or places[place] != parameter):
            found.append(f"{name}: {parameter} is not parameter {place}, but those are {places}")
        if repr(by_name[parameter].default) != repr(default) and (default is not ...):
            found.append(f"{name}: {parameter} is {by_name[parameter].default!r} by default, {default!r} there")
    known = {parameter for parameter, _ in theirs}
    found += [
        f"{name}: {one.name} is needed"
        for one in mine
        if one.name not in known and one.default is REQUIRED and one.kind not in _STARRED
    ]
    return found


def class_problems(theirs: type, ours: type, leaving: frozenset[str] = frozenset()) -> list[str]:
    """The constructor and all public methods that the class has itself."""
    found = problems(f"{theirs.__name__}()", parameters_of(theirs), ours)
    for name, value in vars(theirs).items():
        if name.startswith("_") or name in leaving or not callable(getattr(theirs, name)):
            continue
        if not hasattr(ours, name):
            found.append(f"{theirs.__name__} has no {name}")
        elif inspect.isfunction(inspect.unwrap(getattr(value, "__func__", value))):
            their_method, our_method = getattr(theirs, name), getattr(ours, name)
            found += problems(f"{theirs.__name__}.{name}", parameters_of(their_method), our_method)
    return found


@pytest.mark.parametrize("name", s3torchconnector.dcp.__all__)
def test_s3torchconnector(name: str) -> None:
    assert class_problems(getattr(s3torchconnector.dcp, name), getattr(dcp, name)) == []


def test_s3torchconnector_s_config() -> None:
    assert class_problems(s3torchconnector.S3ClientConfig, dcp.S3ClientConfig) == []


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (torch_dcp.FileSystemReader, dcp.FileSystemReader),
        (torch_dcp.FileSystemWriter, dcp.FileSystemWriter),
        (HuggingFaceStorageReader, dcp.HuggingFaceStorageReader),
        (HuggingFaceStorageWriter, dcp.HuggingFaceStorageWriter),
    ],
)
def test_torch(theirs: type, ours: type) -> None:
    assert class_problems(theirs, ours) == []


def test_torch_s_file_systems_are_torch_s() -> None:
    assert (dcp.FileSystem, dcp.FileSystemBase) == (FileSystem, FileSystemBase)


SAFE_OPEN: dict[str, Recorded] = {
    "keys": [],
    "offset_keys": [],
    "metadata": [],
    "get_tensor": [("name", REQUIRED)],
    "get_tensors": [],
    "get_slice": [("name", REQUIRED)],
}


def test_safetensors() -> None:
    device = [("filename", REQUIRED), ("framework", REQUIRED), ("device", ...), ("backend", ...)]
    assert problems("safe_open", device, engine_loader.safe_open, frozenset({"backend"})) == []
    for name, recorded in SAFE_OPEN.items():
        assert hasattr(safetensors.safe_open, name)
        assert problems(name, recorded, getattr(engine_loader.safe_open, name)) == []
    public = {name for name in dir(safetensors.safe_open) if not name.startswith("_")}
    assert public == set(SAFE_OPEN)
    theirs = parameters_of(safetensors.torch.load_file)
    assert problems("load_file", theirs, safetensors_files.load_file, frozenset({"backend"})) == []


B10_TRANSFER: dict[str, Recorded] = {
    "load_compile_cache": [],
    "save_compile_cache": [],
    "clear_local_cache": [],
    "transfer": [("source", REQUIRED), ("dest", REQUIRED)],
    "get_cache_info": [],
    "list_available_caches": [],
    "get_b10_logger": [("name", REQUIRED)],
    "save_vllm_compile_cache": [],
}
B10_CLASSES = {"CacheError", "CacheValidationError", "CacheOperationInterrupted", "OperationStatus"}


@pytest.mark.parametrize("name", B10_TRANSFER)
def test_b10_transfer(name: str) -> None:
    assert problems(name, B10_TRANSFER[name], getattr(b10_transfer, name)) == []
    assert callable(getattr(engine_loader, name))


def test_b10_transfer_s_names() -> None:
    assert set(b10_transfer.__all__) == B10_CLASSES | set(B10_TRANSFER)
    assert set(b10_transfer.__all__) <= set(engine_loader.__all__)


READ_CHUNKED: Recorded = [
    ("path", REQUIRED),
    ("dev_ptr", REQUIRED),
    ("file_offset", REQUIRED),
    ("total_length", REQUIRED),
    ("chunk_size", 0),
    ("pipelined", False),
]
READER: Recorded = [("mount_point", REQUIRED), ("entries", 64), ("io_depth", 0), ("buffer_size", 64 << 20)]
THREEFS: list[tuple[str, Recorded, Any]] = [
    ("ThreeFSFileReader", READER, threefs.ThreeFSFileReader),
    ("ThreeFSFileReaderCpp", READER, reader_cpp.ThreeFSFileReaderCpp),
    (
        "ThreeFSFileReaderPy",
        [("mount_point", REQUIRED), ("entries", 128), ("io_depth", 0), ("buffer_size", 1 << 30)],
        reader_py.ThreeFSFileReaderPy,
    ),
    ("MockFileReader", [("mount_point", "")], threefs.MockFileReader),
    ("extract_mount_point", [("path", REQUIRED)], threefs.extract_mount_point),
    ("get_hf3fs_lib_path", [], threefs.get_hf3fs_lib_path),
    ("is_available", [], threefs.is_available),
    ("get_backend", [], threefs.get_backend),
    ("create_reader", [("backend", "auto")], threefs.create_reader),
    ("check_library", [], reader_cpp.check_library),
    ("check_library", [], reader_py.check_library),
]


@pytest.mark.parametrize(("name", "theirs", "ours"), THREEFS)
def test_fastsafetensor_3fs_reader(name: str, theirs: Recorded, ours: Any) -> None:
    assert problems(name, theirs, ours) == []
    if inspect.isclass(ours):
        assert problems("read_chunked", READ_CHUNKED, ours.read_chunked) == []  # type: ignore[attr-defined]
        headers: Recorded = [("paths", REQUIRED), ("num_threads", 8)]
        assert problems("read_headers_batch", headers, ours.read_headers_batch) == []  # type: ignore[attr-defined]
        assert problems("close", [], ours.close) == []  # type: ignore[attr-defined]
        for keyword in ("mount_name", "token"):
            inspect.signature(ours).bind("", **{keyword: os.devnull})


def test_a_difference_is_noticed() -> None:
    def theirs(first: int, second: int = 1, third: int = 2) -> None: ...
    def ours(first: int, third: int = 2, second: int = 3, *, needed: int) -> None: ...

    assert problems("f", parameters_of(theirs), ours) == [
        "f: second is not parameter 1, but those are ['first', 'third', 'second']",
        "f: second is 3 by default, 1 there",
        "f: third is not parameter 2, but those are ['first', 'third', 'second']",
        "f: needed is needed",
    ]
