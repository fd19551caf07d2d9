"""An emulator of 3FS's user-space I/O: libhf3fs_api_shared.so over pread.

It serves to try and test the 3FS path without a cluster. It is as strict as the real library, and can simulate faults,
latency and a limited bandwidth (options in emulator.h; options.c reads them).
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

from ..errors import EngineLoaderError

LIBRARY_NAME = "libhf3fs_api_shared.so"
MOUNT_LIBRARY_NAME = "libemulated_mount.so"
_SOURCES = ("options.c", "files.c", "mount.c", "buffers.c", "rings.c", "daemon.c", "requests.c")
_FLAGS = ("-std=gnu11", "-O2", "-g", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden", "-Wall", "-Wextra")
# The soname of the real library, for programs that link to it; never unloaded, because its threads can still run.
_LINK_FLAGS = (f"-Wl,-soname,{LIBRARY_NAME}", "-Wl,-z,nodelete")


class EmulatorBuildError(EngineLoaderError):
    """The emulator could not be built; the message says why."""


def build_emulator(directory: str | os.PathLike[str]) -> Path:
    """Compile the emulator into ``directory``, which is made if it is missing, and return the library's path.

    Beside it lies libemulated_mount.so: a program that preloads it makes its own calls below 3fs-virt/iovs on the
    emulated mount, too.

    Raises:
        EmulatorBuildError: there is no C compiler, or the compiler failed.
    """
    library = Path(directory).absolute() / LIBRARY_NAME
    _compile(library, _SOURCES, _LINK_FLAGS)
    beside = (str(library), "-Wl,-rpath,$ORIGIN")
    _compile(library.with_name(MOUNT_LIBRARY_NAME), ("mount_preload.c",), beside)
    return library


def _compile(library: Path, sources: tuple[str, ...], link_flags: tuple[str, ...]) -> None:
    compiler = _find_compiler()
    unfinished = library.with_suffix(f".{os.getpid()}.tmp")
    here = Path(__file__).parent
    inputs = [str(here / name) for name in sources]
    command = [*compiler, *_FLAGS, *inputs, "-o", str(unfinished), *link_flags, "-lrt"]
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode != 0:
            raise EmulatorBuildError(f"{compiler[0]} could not build the 3FS emulator:\n{done.stderr.strip()}")
        unfinished.replace(library)
    except OSError as error:
        raise EmulatorBuildError(f"could not build the 3FS emulator: {error}") from None
    finally:
        unfinished.unlink(missing_ok=True)


def _find_compiler() -> list[str]:
    chosen = os.environ.get("CC")
    if chosen:
        return shlex.split(chosen)
    for name in ("cc", "gcc", "clang"):
        if shutil.which(name):
            return [name]
    raise EmulatorBuildError("no C compiler was found (tried cc, gcc, clang; set CC to name another)")
