"""Checks 3FS, and the file systems of paths: whether files can be opened, and how they would be read."""

from __future__ import annotations

import errno
import mmap
import os
import resource
from collections.abc import Iterator, Sequence
from dataclasses import replace

from ...errors import CheckpointError, SettingsError
from ...home import why_no_directory
from ...loading.find import (
    NoCheckpointError,
    SafetensorsFiles,
    ShardedState,
    TrainingCheckpoint,
    find_checkpoint,
)
from ...loading.shards import listed_files, open_files
from ...machine import Mount, mount_of
from ...report.load_report import human_bytes
from ...settings import LoaderSettings, load_settings
from ...sources.hub_models import model_here
from ...sources.kept.node_cache import NodeCache
from ...sources.posix import PosixSource
from ...sources.registry import is_remote, make_source
from ...sources.threefs.daemon import find_daemon
from ...sources.threefs.discovery import mounts_here, why_not
from ...sources.threefs.shared_library import (
    DESCRIPTOR_BYTES,
    LIB_DIR_VARIABLE,
    LIBRARY_NAME,
    MOST_DESCRIPTORS,
    ThreeFsError,
    find_library,
    load_library,
)
from ...transfer.modes import choose_mode
from .finding import Finding, cause_and_repair, impatient, write_refused

_AREA = "sources"
_GIVE_PATH = "engine-loader doctor /path/to/model checks the file system of a model's weights"
_NETWORK = ("nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "lustre", "gpfs", "beegfs", "virtiofs", "afs")


def check_paths(paths: Sequence[str]) -> Iterator[Finding]:
    """The file system of every path, whether the weights can be opened, and whether O_DIRECT works."""
    settings = load_settings().settings.loader
    if settings.weights_uri is not None:
        yield from _check_named("loader.weights_uri", settings.weights_uri)
    if settings.cache_directory is not None:
        yield _check_node_cache(settings)
    if not paths:
        yield Finding(_AREA, "file systems", "absent", "no path was given", _GIVE_PATH)
    for path in paths:
        try:
            yield from _check(model_here(path))
        except CheckpointError as error:
            yield Finding(_AREA, path, "fail", str(error), "give a model's directory or URL")


def _check_named(name: str, path: str) -> Iterator[Finding]:
    """As for a path that was given, under the name of the setting that names it."""
    for number, finding in enumerate(_check(path)):
        yield finding if number else replace(finding, name=name, value=f"{path}: {finding.value}")


def _check_node_cache(settings: LoaderSettings) -> Finding:
    """Whether what is read of object stores can be kept on this node."""
    name = "loader.cache_directory"
    repair = "name a directory that this user can write; until then, nothing is kept, and loads are as without it"
    cache = NodeCache.from_settings(settings)
    if cache is None:
        reason = why_no_directory(str(settings.cache_directory)) or "it cannot be made, or others may write it"
        return Finding(_AREA, name, "fail", f"{settings.cache_directory}: {reason}", repair)
    if refused := write_refused(str(cache.directory)):
        return Finding(_AREA, name, "fail", f"{refused} in {cache.directory}", repair)
    facts = os.statvfs(cache.directory)
    limit = "what there is room for" if cache.limit_bytes is None else f"up to {human_bytes(cache.limit_bytes)}"
    free = human_bytes(facts.f_bavail * facts.f_frsize)
    return Finding(_AREA, name, "ok", f"{cache.directory} (writable, {free} free) keeps {limit}")


def check_3fs() -> Iterator[Finding]:
    """Whether 3FS is mounted on this machine, and its library found and usable."""
    settings = _settings()
    lib_dir = settings.hf3fs_lib_dir
    search = find_library(lib_dir)
    at = ", ".join(mounts_here())
    mounted = f"mounted at {at}" if at else "no 3FS mount here"
    is_wanted = settings.backend == "usrbio"
    if at:
        yield _daemon()
    elif is_wanted:
        repair = "mount 3FS, or set loader.backend to auto: no checkpoint can be loaded with this setting"
        yield Finding(_AREA, "usrbio", "fail", "loader.backend is usrbio, and there is no 3FS mount here", repair)
        return
    if search.path is None:
        repair = (
            f"set {LIB_DIR_VARIABLE} to the directory of {LIBRARY_NAME}; until then, files are read through the mount"
        )
        explained = f"{mounted}; {search.explain()}"
        if not at and not is_wanted:
            yield Finding(_AREA, "usrbio", "absent", mounted, detail=search.explain())
            return
        yield Finding(_AREA, "usrbio", "fail" if is_wanted else "warn", explained, repair)
        return
    yield from _descriptor_limit()
    try:
        load_library(search.path)
    except ThreeFsError as error:
        repair = f"set {LIB_DIR_VARIABLE} to a build for this machine"
        yield Finding(_AREA, "usrbio", "warn", f"{mounted}; {error}", repair)
        return
    found = f"{mounted}; {search.path}, found by {search.origin}"
    problem = why_not(lib_dir=lib_dir) if at else None
    if problem is None:
        yield Finding(_AREA, "usrbio", "ok" if at else "absent", found)
    else:
        yield Finding(_AREA, "usrbio", "warn", f"{found}; {problem}", "until then, files are read through the mount")


def _daemon() -> Finding:
    """Whether 3FS's daemon sees the thread ids of its clients."""
    name = "3FS daemon"
    daemon = find_daemon()
    if daemon is None:
        value = "not visible from here"
        repair = (
            "one on the host is as it should be; one in a container beside this one must share its PID namespace "
            "(shareProcessNamespace: true) or the host's (hostPID: true)"
        )
        return Finding(_AREA, name, "ok", value, repair)
    if daemon.tells_apart:
        return Finding(_AREA, name, "ok", f"process {daemon.pid}, in the PID namespace of its clients")
    value = (
        f"process {daemon.pid} is in another PID namespace: it sees every client as process 0, and when one ends, "
        "it removes the buffers and rings of all"
    )
    return Finding(_AREA, name, "warn", value, "run the daemon with hostPID: true, or shareProcessNamespace: true")


def _descriptor_limit() -> Iterator[Finding]:
    """What 3FS's library would take for its table of descriptors, where that is much."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= hard <= MOST_DESCRIPTORS:
        return
    size = "an endless table" if hard < 0 else human_bytes(hard * DESCRIPTOR_BYTES)
    value = f"the hard limit of open files is {hard}, for which 3FS's library would take {size} a process"
    repair = f"engine_loader lowers it to {MOST_DESCRIPTORS} before it loads the library; for others: ulimit -Hn"
    yield Finding(_AREA, "open files", "warn", value, repair)


def _settings() -> LoaderSettings:
    try:
        return load_settings().settings.loader
    except SettingsError:  # software.check_settings reports the problem
        return LoaderSettings()


def is_network(mount: Mount) -> bool:
    """True if the type of a file system is one that reads over a network (FUSE counts as one)."""
    return mount.kind in _NETWORK or mount.kind.startswith("fuse.")


def _check(path: str) -> Iterator[Finding]:
    settings = impatient(load_settings().settings.loader)
    mount = None if is_remote(path) else mount_of(path)
    where = "" if is_remote(path) else f"{mount.kind} from {mount.source}; " if mount else "an unknown file system; "
    try:
        source = make_source(settings.backend, settings=settings)
        found = find_checkpoint(source, path, sharded_pattern=settings.sharded_pattern)
        if isinstance(found, TrainingCheckpoint):
            yield Finding(_AREA, path, "ok", f"{where}a training checkpoint, listed by {source.name}")
            return
        files, _ = listed_files(source, found)
        # Their headers are read: a file that can be opened may be a pointer of git-lfs, or cut short.
        with open_files(source, SafetensorsFiles(tuple(files))) as opened:
            nbytes = sum(shard.file.size for shard in opened.files)
    except NoCheckpointError as error:
        if is_remote(path):
            yield _failed(path, error)
        else:
            advice = "give a model's directory to check reading"
            yield Finding(_AREA, path, "ok", f"{where}no weights directly in this directory", advice)
        return
    except CheckpointError as error:
        yield _failed(path, error)
        return
    what = f"{len(files)} {'object' if is_remote(path) else 'file'}{'' if len(files) == 1 else 's'}"
    ranks = f" of {len(found.shards)} ranks" if isinstance(found, ShardedState) else ""
    yield Finding(_AREA, path, "ok", f"{where}{what}{ranks}, {human_bytes(nbytes)}, all have a sound header")
    if not is_remote(path):
        yield _direct(path, files[0], mount)
        yield _read_mode(path, files[0])
        yield from _usrbio(path, files[0])


def _failed(path: str, error: CheckpointError) -> Finding:
    value, repair = cause_and_repair(error, "engine-loader inspect --check says what is wrong with a checkpoint")
    return Finding(_AREA, path, "fail", value, repair)


def _usrbio(path: str, file: str) -> Iterator[Finding]:
    """Whether the first file, if it is on 3FS, would be read by USRBIO."""
    problem = why_not(file, _settings().hf3fs_lib_dir)
    if problem is None:
        yield Finding(_AREA, f"usrbio on {path}", "ok", "backend: auto reads these files by USRBIO")
    elif any(os.path.realpath(file).startswith(os.path.join(mount, "")) for mount in mounts_here()):
        yield Finding(_AREA, f"usrbio on {path}", "warn", problem, "until then, files are read through the mount")


def _read_mode(path: str, file: str) -> Finding:
    """The mode that read_mode auto chooses for the first file now."""
    opened = PosixSource().open(file)
    try:
        mode = choose_mode(opened)
    finally:
        opened.close()
    return Finding(_AREA, f"read_mode: auto on {path}", "ok", f"{mode.name} now ({mode.reason})")


def _direct(path: str, file: str, mount: Mount | None) -> Finding:
    """Whether O_DIRECT works, by reading a page with it."""
    name = f"direct IO on {path}"
    refused = _read_directly(file)
    if refused is None:
        return Finding(_AREA, name, "ok", "works")
    reason = errno.errorcode.get(refused, str(refused))
    repair = "files are read through the page cache: leave memory for it, and set loader.read_mode to auto or buffered"
    if mount is not None and mount.kind in ("tmpfs", "ramfs"):
        return Finding(_AREA, name, "absent", f"not needed: a {mount.kind} is memory")
    return Finding(_AREA, name, "warn", f"refused with {reason}", repair)


def _read_directly(file: str) -> int | None:
    """The errno with which reading by O_DIRECT failed; None if it worked."""
    try:
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
    except OSError as error:
        return error.errno or errno.EIO
    try:
        with mmap.mmap(-1, mmap.PAGESIZE) as page:  # O_DIRECT needs aligned memory
            os.preadv(fd, [page], 0)
    except OSError as error:
        return error.errno or errno.EIO
    finally:
        os.close(fd)
    return None
