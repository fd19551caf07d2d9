"""Every command and function where a user has no name or home, nothing is writable, or little is allowed.

A traceback is never the answer; what can be done is done, and what cannot be done is told in one message. In short,
several at once; each by itself, and the commands that build an engine's model, with EXTENDED_TESTS=1
(``make test-surroundings``).
"""

import ctypes
import logging
import os
import resource
import struct
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint import save as dcp_save

import engine_loader
from engine_loader import CheckpointError, OperationStatus, open_checkpoint
from engine_loader.cli import app
from engine_loader.compile_cache.process.session import run_job
from engine_loader.conversion import convert_checkpoint
from tests.cli.running import invoke
from tests.support.children import ChildDied, in_child
from tests.support.mounts import make_read_only, make_writable, mount_tmpfs, own_mounts

EXTENDED = "EXTENDED_TESTS" in os.environ
UNNAMED = 54321
TENSORS = {"a": torch.arange(100_000, dtype=torch.float32), "b": torch.ones(3)}
STORE = "ENGINE_LOADER_COMPILE_CACHE__DIRECTORY"
VARIABLES = ("HOME", "XDG_CACHE_HOME", "TMPDIR", "TEMP", "TMP", "USER", "LOGNAME", "LNAME", "USERNAME")
CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "VLLM_CACHE_ROOT", "TORCH_CACHE_DIR")


def without_a_name(_: Path) -> None:
    """A container's user with an arbitrary number, and no HOME."""
    _become_unnamed()
    os.environ.pop("HOME", None)


def without_home(place: Path) -> None:
    """The home is the one that the system knows of; these tests leave it alone."""
    os.environ.pop("HOME", None)
    os.environ["TRITON_CACHE_DIR"] = str(place / "triton")
    os.environ[STORE] = str(place / "store")


def home_is_the_root(place: Path) -> None:
    _read_only_root(place)
    os.environ["HOME"] = "/"


def home_is_read_only(place: Path) -> None:
    own_mounts()
    make_read_only(place / "home")


def without_a_temporary_directory(place: Path) -> None:
    _read_only_root(place)
    os.environ["HOME"] = str(place / "home")


def without_shared_memory(_: Path) -> None:
    own_mounts()
    mount_tmpfs(Path("/dev/shm"), "ro,size=4k,mode=000")


def few_descriptors(_: Path) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))


def small_files(_: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, 64 << 10))


def without_io_uring(_: Path) -> None:
    """As the default profiles of container runtimes have it."""
    libc = ctypes.CDLL(None, use_errno=True)
    code = [
        (0x20, 0, 0, 0),  # the number of the system call
        (0x35, 0, 2, 425),  # io_uring_setup or more
        (0x25, 1, 0, 427),  # more than io_uring_register
        (0x06, 0, 0, 0x00050001),  # EPERM
        (0x06, 0, 0, 0x7FFF0000),  # allowed
    ]
    program = b"".join(struct.pack("HBBI", *line) for line in code)
    buffer = ctypes.create_string_buffer(program)
    filters = struct.pack("HxxxxxxP", len(code), ctypes.addressof(buffer))
    assert libc.prctl(38, 1, 0, 0, 0) == 0
    assert libc.prctl(22, 2, filters, 0, 0) == 0, os.strerror(ctypes.get_errno())


def without_a_compiler(_: Path) -> None:
    os.environ["PATH"] = "/nonexistent"
    os.environ.pop("CXX", None)


def several_at_once(place: Path) -> None:
    home_is_the_root(place)
    few_descriptors(place)
    without_io_uring(place)
    without_a_compiler(place)


def _become_unnamed() -> None:
    """Another number for this user: its files are still its own."""
    user, group = os.geteuid(), os.getegid()
    if ctypes.CDLL(None, use_errno=True).unshare(0x10000000) != 0:
        raise OSError(ctypes.get_errno(), "no user namespaces")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{UNNAMED} {user} 1")
    Path("/proc/self/gid_map").write_text(f"{UNNAMED} {group} 1")


def _read_only_root(place: Path) -> None:
    """Nothing but a volume can be written."""
    own_mounts()
    for path in ("/tmp", "/var/tmp", "/dev/shm"):
        make_read_only(Path(path))
    make_writable(place)
    for name in VARIABLES:
        os.environ.pop(name, None)
    tempfile.tempdir = None
    tempfile._candidate_tempdir_list = lambda: ["/tmp", "/var/tmp", "/dev/shm"]  # type: ignore[attr-defined]


SITUATIONS: dict[str, Callable[[Path], None]] = {
    function.__name__: function
    for function in (
        without_a_name,
        without_home,
        home_is_the_root,
        home_is_read_only,
        without_a_temporary_directory,
        without_shared_memory,
        few_descriptors,
        small_files,
        without_io_uring,
        without_a_compiler,
        several_at_once,
    )
}
SHORT = ("without_a_name", "small_files", "several_at_once")


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a training checkpoint, and room."""
    place = tmp_path_factory.mktemp("volume")
    (place / "model").mkdir()
    save_file(TENSORS, place / "model" / "model.safetensors")
    (place / "model" / "config.json").write_text("{}")
    dcp_save(dict(TENSORS), checkpoint_id=place / "training", no_dist=True)
    # What is imported is not what is tried here.
    for arguments in (("doctor", "--quick"), ("compile-cache", "info", "--engine", "torch"), ("settings",)):
        invoke(*arguments, env={"ENGINE_LOADER_COMPILE_CACHE__DIRECTORY": str(place / "none")})
    convert_checkpoint(str(place / "model"), str(place / "warm"), to="dcp")
    if EXTENDED:
        from tests.support.tiny_models import make_model

        make_model("llama", place / "llama")
        assert invoke("explain-load", place / "llama").exit_code == 0
    return place


def commands(place: Path) -> dict[str, tuple[str | Path, ...]]:
    model, training = place / "model", place / "training"
    resharded = ("reshard", place / "llama", place / "resharded", "-tp", "2")
    return {
        "version": ("--version",),
        "settings": ("settings",),
        "inspect": ("inspect", "--check", model),
        "inspect training": ("inspect", training),
        "convert": ("convert", training, place / "out"),
        "convert to dcp": ("convert", model, place / "dcp", "--to", "dcp"),
        "doctor": ("doctor", "--quick", model),
        "warm": ("warm", model),
        "patch list": ("patch", "list"),
        "report list": ("report", "list"),
        "info": ("compile-cache", "info", "--engine", "torch"),
        "list": ("compile-cache", "list"),
        "explain": ("compile-cache", "explain", "--engine", "torch"),
        "load": ("compile-cache", "load", "--engine", "torch", "--scope", "s"),
        "save": ("compile-cache", "save", "--engine", "torch", "--scope", "s"),
        "verify": ("compile-cache", "verify"),
        "prune": ("compile-cache", "prune", "--dry-run"),
        "clear": ("compile-cache", "clear", "--engine", "torch", "--yes"),
        "keygen": ("compile-cache", "keygen", place / "key"),
        "keys": ("compile-cache", "keys", place / "key"),
        "bench": ("bench", "read", "--no-peers", "--rounds", "1", "--threads", "1", "--json", model),
        **({"explain-load": ("explain-load", place / "llama", "-tp", "2"), "reshard": resharded} if EXTENDED else {}),
    }


Answer = tuple[int, str]


def run_commands(place: Path) -> dict[str, Answer]:
    found = {}
    for name, arguments in commands(place).items():
        result = invoke(*arguments, env={STORE: os.environ.get(STORE)})
        text = result.output
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            text += "".join(traceback.format_exception(result.exception))
        found[name] = result.exit_code, text
    return found


def read(place: Path) -> bool:
    with open_checkpoint(place / "model") as checkpoint:
        target = {name: torch.empty_like(tensor) for name, tensor in TENSORS.items()}
        checkpoint.load_into(target)
        same = all(torch.equal(target[name], tensor) for name, tensor in checkpoint.tensors())
    with open_checkpoint(place / "training") as checkpoint:
        return same and torch.equal(checkpoint.get_tensor("a"), TENSORS["a"])


def call_functions(place: Path) -> dict[str, Any]:
    functions: dict[str, Callable[[], Any]] = {
        "read": lambda: read(place),
        "load_compile_cache": lambda: engine_loader.load_compile_cache().name,
        "save_compile_cache": lambda: engine_loader.save_compile_cache().name,
        "get_cache_info": lambda: engine_loader.get_cache_info()["local_cache_exists"],
        "list_available_caches": lambda: engine_loader.list_available_caches()["total_caches"],
        "clear_local_cache": engine_loader.clear_local_cache,
        "transfer": lambda: engine_loader.transfer(place / "model" / "config.json", place / "copy").name,
    }
    found = {}
    for name, function in functions.items():
        try:
            found[name] = function()
        except CheckpointError as error:
            found[name] = str(error)
        except BaseException:
            found[name] = traceback.format_exc()
    return found


@pytest.fixture(params=SITUATIONS if EXTENDED else SHORT, scope="module")
def answers(request: pytest.FixtureRequest, volume: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each command and function says in a situation."""
    place = tmp_path_factory.mktemp("place")
    (place / "home").mkdir()
    for name in ("model", "training", "llama"):
        (place / name).symlink_to(volume / name)

    def work() -> dict[str, Any]:
        logging.raiseExceptions = False  # vLLM's handlers write to the output of the first command, which is closed
        for name in [name for name in os.environ if name.startswith("ENGINE_LOADER_")] + list(CACHES):
            os.environ.pop(name, None)
        os.environ |= {
            "HOME": str(place / "home"),
            "XDG_CACHE_HOME": "",
            "TORCHINDUCTOR_CACHE_DIR": str(place / "inductor"),
            "BASETEN_FS_ENABLED": "1",
        }
        os.chdir(place)  # where a home that is not known is taken to be
        SITUATIONS[request.param](place)
        return {**run_commands(place), **call_functions(place), "situation": request.param}

    try:
        return in_child(work, timeout_s=300 if EXTENDED else 120)
    except ChildDied as death:
        if "namespace" in str(death) or "own_mounts" in str(death) or "Operation not permitted" in str(death):
            pytest.skip(f"this machine does not let a process be in this situation: {str(death).splitlines()[-1]}")
        raise


NO_STORE = ("without_a_name", "home_is_the_root", "home_is_read_only", "several_at_once")
"""Situations in which the default store, or a cache, cannot be written."""


def test_no_command_and_no_function_ends_in_a_traceback(answers: dict[str, Any]) -> None:
    situation = answers["situation"]
    assert len(commands(Path())) < len(answers)
    tracebacks = {name: answer for name, answer in answers.items() if "Traceback" in str(answer)}
    assert tracebacks == {}, "\n".join(f"{name}: {answer}" for name, answer in tracebacks.items())

    for name in ("version", "settings", "inspect", "inspect training", "patch list", "warm"):
        assert answers[name][0] == 0, (name, answers[name])
    assert answers["read"] is True
    assert answers["bench"][0] == 0, answers["bench"]
    written = ("convert", "convert to dcp", "reshard") if EXTENDED else ("convert", "convert to dcp")
    for name in written:
        status, text = answers[name]
        if situation == "small_files":
            assert status == 1
            assert "it could not be written: File too large" in text
        else:
            assert status == 0, (name, text)
    assert answers["keygen"][0] == answers["clear"][0] == 0, (answers["keygen"], answers["clear"])
    if situation != "without_a_name":  # in a user namespace, root's own directories are somebody else's
        assert answers["keys"][0] == 0, answers["keys"]
    assert answers["transfer"] == "SUCCESS"
    if situation == "without_a_name":
        nowhere = "there is no home directory (HOME is not set, and this user has no name)"
        assert any(nowhere in str(answers[name]) for name in ("load", "save", "info", "doctor"))
    if situation in NO_STORE:
        assert answers["load_compile_cache"] in (OperationStatus.ERROR.name, OperationStatus.DOES_NOT_EXIST.name)
        assert answers["load"][1].strip()
    else:
        assert answers["load_compile_cache"] == OperationStatus.DOES_NOT_EXIST.name
    for name in ("get_cache_info", "list_available_caches"):
        assert answers[name] in (False, 0)


def test_doctor_tells_of_what_is_missing(answers: dict[str, Any]) -> None:
    situation = answers["situation"]
    status, text = answers["doctor"]
    assert status in (0, 1)
    told = {
        "home_is_the_root": "/.cache",
        "several_at_once": "64 at once",
        "home_is_read_only": "Read-only file system",
        "without_a_temporary_directory": "set TMPDIR to one that can be written",
        "without_shared_memory": "/dev/shm",
        "few_descriptors": "64 at once",
        "without_a_name": "~/.cache",
    }
    assert told.get(situation, "") in text


def test_commands_are_all_here() -> None:
    """A new command is tried, too."""
    tried = {arguments[0] for arguments in commands(Path("x")).values()}
    slow = {"emulate-3fs"} if EXTENDED else {"explain-load", "reshard", "emulate-3fs"}  # they compile, or build models
    named = {command.name or command.callback.__name__ for command in app.registered_commands}  # type: ignore[union-attr]
    groups = {group.name for group in app.registered_groups}
    assert (named | groups) - slow <= tried


def test_a_job_without_any_place_for_its_files_is_an_outcome(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from engine_loader.compile_cache.process import session
    from tests.compile_cache.support import Machine
    from tests.compile_cache.test_stores import job, settings_for

    monkeypatch.setattr(session, "first_writable", lambda _: None)
    machine = Machine(tmp_path / "machine", tmp_path / "store")
    outcome = run_job(job("restore", machine, settings_for(tmp_path / "store")), 10)
    assert outcome.status == "failed"
    assert "set compile_cache.work_directory or TMPDIR" in outcome.messages[0]
