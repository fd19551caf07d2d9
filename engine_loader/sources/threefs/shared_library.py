"""3FS's own library, libhf3fs_api_shared.so: where it is looked for, and the calls that Python makes to it.

Facts about the library are from deepseek-ai/3FS, src/lib/api (2026-03).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import os
import re
import resource
import struct
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

logger = logging.getLogger(__name__)

LIBRARY_NAME = "libhf3fs_api_shared.so"
LIB_DIR_VARIABLE = "HF3FS_LIB_DIR"
BINDING = "hf3fs_py_usrbio"
VIRTUAL_DIR = "3fs-virt"
_MOUNT_TYPE = "fuse.hf3fs"
_MAGIC_REQUEST, _MAGIC = 0x80046802, 0x8F3F5FFF
_MOUNT_CHARS = 4096
# Not RTLD_GLOBAL: the library's copies of folly and fmt would serve other libraries. An extension that needs the
# library is satisfied by its name all the same.
_LOAD_FLAGS = os.RTLD_LOCAL | os.RTLD_NOW | os.RTLD_NODELETE
MOST_DESCRIPTORS = 1 << 20
DESCRIPTOR_BYTES = 8
"""What the library's table of descriptors takes for each that the hard limit of open files allows."""
_LOADER_CACHE = Path("/etc/ld.so.cache")


class ThreeFsError(Exception):
    """The library was not found, or is not usable; the message says why."""


@dataclass(frozen=True)
class LibrarySearch:
    """Where the library was looked for.

    Attributes:
        path: the library, or None.
        origin: what named its directory: "HF3FS_LIB_DIR", "LD_LIBRARY_PATH", "hf3fs_py_usrbio", "/usr/lib" or
            "/etc/ld.so.cache".
        tried: every directory that was looked at, one line each, for messages.
    """

    path: Path | None
    origin: str
    tried: tuple[str, ...]

    def explain(self) -> str:
        """Why there is no library: each directory that was tried."""
        return f"{LIBRARY_NAME} was not found: " + "; ".join(self.tried)


def find_library(lib_dir: str | None = None, environ: Mapping[str, str] | None = None) -> LibrarySearch:
    """Look in HF3FS_LIB_DIR, LD_LIBRARY_PATH, beside an installed binding, in /usr/lib, and where dlopen looks.

    Args:
        lib_dir: used instead of HF3FS_LIB_DIR.
        environ: used instead of os.environ.
    """
    tried: list[str] = []
    for origin, directory in _directories(lib_dir, os.environ if environ is None else environ):
        if not directory:
            tried.append(f"{origin} is not set" if origin != BINDING else f"{BINDING} is not installed")
            continue
        found = _library_in(Path(directory))
        if found is not None:
            return LibrarySearch(found.absolute(), origin, (*tried, f"{origin}: {found}"))
        tried.append(f"{origin}: not in {directory}")
    cached = _library_of_loader()
    if cached is not None:
        return LibrarySearch(cached, str(_LOADER_CACHE), (*tried, f"{_LOADER_CACHE}: {cached}"))
    return LibrarySearch(None, "", (*tried, f"not in {_LOADER_CACHE}"))


class ThreeFsLibrary:
    """The library, loaded. It stays loaded: whatever has it as a dependency is satisfied by this copy.

    Attributes:
        path: where it was loaded from.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        limit_descriptors()
        try:
            self.calls = ctypes.CDLL(os.fspath(path), mode=_LOAD_FLAGS)
            _declare(self.calls)
        except (OSError, AttributeError) as error:
            raise ThreeFsError(f"{path} cannot be used: {error}") from None

    def is_threefs(self, fd: int) -> bool:
        """Whether an open file or directory is on 3FS."""
        return bool(self.calls.hf3fs_is_hf3fs(fd))

    def mount_of(self, fd: int) -> str | None:
        """The 3FS mount that an open file is on, or None."""
        if os.fstat(fd).st_nlink == 0:  # removed: the library would end the process
            return None
        return self.mount_point(f"/proc/self/fd/{fd}")

    def mount_point(self, path: str) -> str | None:
        """The 3FS mount that ``path`` is on, or None."""
        if not os.path.exists(path):  # the library would end the process
            return None
        buffer = ctypes.create_string_buffer(_MOUNT_CHARS)
        length = self.calls.hf3fs_extract_mount_point(buffer, len(buffer), os.fsencode(path))
        return os.fsdecode(buffer.value) if 0 < length <= len(buffer) and buffer.value else None

    def register(self, fd: int) -> None:
        """Make a descriptor known, once, before it is read from.

        Raises:
            OSError: EBADF: not on 3FS; EINVAL: registered already; EMFILE: each takes a second descriptor.
        """
        code = self.calls.hf3fs_reg_fd(fd, 0)
        if code > 0:
            raise OSError(code, os.strerror(code))

    def deregister(self, fd: int) -> None:
        """Undo ``register``; before the descriptor is closed."""
        self.calls.hf3fs_dereg_fd(fd)


def limit_descriptors() -> None:
    """Lower the hard limit of open files to what the library can be loaded with.

    As it is loaded it makes a table of 8 bytes for each descriptor that the hard limit allows: 8.6 GB in a container
    without a limit. The limit stays lowered, because the library does not check every descriptor against its table.

    Raises:
        ThreeFsError: the limit is too high and cannot be lowered.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= hard <= MOST_DESCRIPTORS:
        return
    lowered = MOST_DESCRIPTORS if soft < 0 else min(soft, MOST_DESCRIPTORS)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowered, MOST_DESCRIPTORS))
    except (OSError, ValueError) as error:
        raise ThreeFsError(
            f"the hard limit of open files is {hard}, for which 3FS's library takes {hard * DESCRIPTOR_BYTES >> 20} "
            f"MiB a process, and it cannot be lowered ({error}): start with `ulimit -Hn {MOST_DESCRIPTORS}`"
        ) from None
    logger.info("lowered the hard limit of open files from %d to %d, before 3FS's library is loaded", hard, lowered)


@cache
def load_library(path: Path) -> ThreeFsLibrary:
    """Load the library, once per path.

    Raises:
        ThreeFsError: it cannot be loaded, or lacks a function.
    """
    return ThreeFsLibrary(path)


def is_threefs_by_ioctl(fd: int) -> bool:
    """Whether a descriptor is on 3FS, found out without the library."""
    try:
        answer = fcntl.ioctl(fd, _MAGIC_REQUEST, b"\0\0\0\0")
    except OSError:
        return False
    return bool(struct.unpack("=I", answer)[0] == _MAGIC)


def mounts(mountinfo: Path = Path("/proc/self/mountinfo")) -> list[str]:
    """Where 3FS is mounted on this machine."""
    try:
        lines = mountinfo.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return []
    fields = [line.split() for line in lines]
    found = [_unescape(line[4]) for line in fields if "-" in line and line[line.index("-") + 1] == _MOUNT_TYPE]
    return [os.path.dirname(mount) if os.path.basename(mount) == VIRTUAL_DIR else mount for mount in found]


def check_mount(mount: str) -> str | None:
    """What is wrong with a mount, or None: its directory for buffers must be there, and /dev/shm to share them by."""
    if len(os.fsencode(mount)) >= 256:
        return f"the path of the mount {mount} is longer than the 255 bytes that 3FS takes"
    buffers = os.path.join(mount, VIRTUAL_DIR, "iovs")
    if not os.path.isdir(buffers):
        return f"{buffers} is missing: is 3FS's daemon running, and is all of the mount visible here?"
    if not os.path.isdir("/dev/shm"):
        return "there is no /dev/shm, by which 3FS's daemon and its clients share memory"
    return None


def _directories(lib_dir: str | None, environ: Mapping[str, str]) -> Iterator[tuple[str, str | None]]:
    yield LIB_DIR_VARIABLE, lib_dir or environ.get(LIB_DIR_VARIABLE)
    search = [directory for directory in environ.get("LD_LIBRARY_PATH", "").split(":") if directory]
    for directory in search or [""]:
        yield "LD_LIBRARY_PATH", directory
    for directory in _binding_directories() or [""]:
        yield BINDING, directory
    yield "/usr/lib", "/usr/lib"


def _binding_directories() -> list[str]:
    """Where wheels of the binding put the library: a repaired one, one beside the extension, one in a package."""
    try:
        spec = find_spec(BINDING)
    except ValueError:  # a module of that name without a spec, as a stand-in in sys.modules
        return []
    if spec is None:
        return []
    beside = Path(spec.origin).parent if spec.origin else Path(sysconfig.get_paths()["platlib"])
    packages = list(map(Path, spec.submodule_search_locations or []))
    if packages:
        beside = packages[0].parent
    inside = [place for package in packages for place in (package, package / "lib")]
    return list(map(str, (beside / f"{BINDING}.libs", beside, *inside)))


@cache
def _library_of_loader() -> Path | None:
    """The library that dlopen would find by its name alone, by what ldconfig wrote."""
    try:
        cached = _LOADER_CACHE.read_bytes()
    except OSError:
        return None
    found = re.search(rb"/[^\0]*/" + re.escape(LIBRARY_NAME.encode()) + rb"(?=\0)", cached)
    return Path(os.fsdecode(found[0])) if found else None


def _library_in(directory: Path) -> Path | None:
    if (directory / LIBRARY_NAME).is_file():
        return directory / LIBRARY_NAME
    # A repaired wheel gives its libraries names with a digest.
    found = sorted(directory.glob("libhf3fs_api_shared*.so*"))
    return found[0] if found else None


def _unescape(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def _declare(calls: ctypes.CDLL) -> None:
    pointer, size, code = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    u64, text, flag = ctypes.c_uint64, ctypes.c_char_p, ctypes.c_bool
    for name, result, arguments in (
        ("hf3fs_is_hf3fs", flag, (code,)),
        ("hf3fs_extract_mount_point", code, (text, code, text)),
        ("hf3fs_reg_fd", code, (code, u64)),
        ("hf3fs_dereg_fd", None, (code,)),
        ("hf3fs_iovwrap", code, (pointer, pointer, text, text, size, size, code)),
        ("hf3fs_iorcreate4", code, (pointer, text, code, flag, code, code, code, u64)),
        ("hf3fs_iordestroy", None, (pointer,)),
        ("hf3fs_io_entries", code, (pointer,)),
        ("hf3fs_prep_io", code, (pointer, pointer, flag, pointer, code, size, u64, pointer)),
        ("hf3fs_submit_ios", code, (pointer,)),
        ("hf3fs_wait_for_ios", code, (pointer, pointer, code, code, pointer)),
    ):
        function = getattr(calls, name)
        function.restype = result
        function.argtypes = arguments


def register_hint(code: int | None) -> str | None:
    """What a person can do when a descriptor could not be registered."""
    return {
        errno.EBADF: "the file is not on 3FS",
        errno.EINVAL: "the descriptor is registered already: was one closed without hf3fs_dereg_fd?",
        errno.EMFILE: "every registered file takes two descriptors: raise `ulimit -n`",
    }.get(code or 0)
