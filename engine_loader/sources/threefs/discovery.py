"""How this process reaches 3FS, by its library or its Python binding, and whether a read would work."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any, Protocol

from .rings import Rings
from .shared_library import (
    BINDING,
    ThreeFsError,
    ThreeFsLibrary,
    check_mount,
    find_library,
    is_threefs_by_ioctl,
    limit_descriptors,
    load_library,
    mounts,
)

_BINDING_CALLS = ("extract_mount_point", "register_fd", "deregister_fd")


class Client(Protocol):
    """The way to 3FS in this process: its library, or its Python binding where there is no library.

    Attributes:
        library: the library's path, for the native reader threads, or None.
        binding: the module ``hf3fs_py_usrbio``, or an object with its interface.
        name: for messages.
    """

    library: str | None
    binding: Any
    name: str

    def mount_of(self, path: str, fd: int) -> str | None:
        """The 3FS mount that the open file ``path`` is on, or None."""
        ...


class LibraryClient:
    """3FS by its library."""

    def __init__(self, library: ThreeFsLibrary) -> None:
        self.library: str | None = os.fspath(library.path)
        self.binding: Any = Rings(library)
        self.name = self.library
        self._calls = library

    def mount_of(self, path: str, fd: int) -> str | None:
        return self._calls.mount_of(fd) if self._calls.is_threefs(fd) else None


class BindingClient:
    """3FS by the binding hf3fs_py_usrbio."""

    def __init__(self) -> None:
        self.library: str | None = None
        limit_descriptors()
        self.binding: Any = import_module(BINDING)
        missing = [name for name in _BINDING_CALLS if not callable(getattr(self.binding, name, None))]
        if missing:
            raise ThreeFsError(f"{BINDING}, as it is here, has no {missing[0]}")
        self.name = BINDING

    def mount_of(self, path: str, fd: int) -> str | None:
        if os.fstat(fd).st_nlink == 0:  # removed: the library would end the process
            return None
        mount = self.binding.extract_mount_point(f"/proc/self/fd/{fd}")
        return mount if mount and isinstance(mount, str) and (is_threefs_by_ioctl(fd) or self._registers(fd)) else None

    def _registers(self, fd: int) -> bool:
        try:
            self.binding.register_fd(fd)
        except OSError:
            return False
        self.binding.deregister_fd(fd)
        return True


def find_client(lib_dir: str | None = None) -> Client:
    """The way to 3FS in this process: the library, else the binding.

    Raises:
        ThreeFsError: neither was found; the message names each directory that was tried.
    """
    search = find_library(lib_dir)
    problem = search.explain()
    if search.path is not None:
        try:
            return LibraryClient(load_library(search.path))
        except ThreeFsError as error:
            problem = str(error)
    try:
        return BindingClient()
    except (ImportError, ThreeFsError) as error:
        raise ThreeFsError(f"{problem}; {BINDING}: {error}") from None


def is_available(path: str | None = None, lib_dir: str | None = None) -> bool:
    """Whether a read by USRBIO would work: the library loads, and 3FS is mounted with all that a read needs.

    Args:
        path: a file or directory on 3FS; None: whether any 3FS mount can be read.
        lib_dir: where the library is.
    """
    return why_not(path, lib_dir) is None


def why_not(path: str | None = None, lib_dir: str | None = None) -> str | None:
    """Why a read by USRBIO would fail, or None where it would work. Arguments as for ``is_available``."""
    try:
        client = find_client(lib_dir)
    except ThreeFsError as error:
        return str(error)
    paths = [path] if path is not None else mounts_here()
    if not paths:
        return "no 3FS is mounted on this machine"
    problems = [_problem(client, path) for path in paths]
    return None if None in problems else problems[0]


def mounts_here() -> list[str]:
    """The 3FS mounts of this machine, and that of an emulator, which is not in the mount table."""
    return [*mounts(), *filter(None, [os.environ.get("HF3FS_EMULATOR_MOUNT")])]


def _problem(client: Client, path: str) -> str | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        return f"{path}: {error.strerror}"
    try:
        mount = client.mount_of(path, fd)
    finally:
        os.close(fd)
    return f"{path} is not on 3FS" if mount is None else check_mount(mount)
