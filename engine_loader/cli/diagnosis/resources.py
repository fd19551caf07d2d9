"""Checks the resources of the machine or container: CPUs, memory, descriptors, huge pages, shared memory."""

from __future__ import annotations

import os
import re
import resource
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ...machine import cgroup_cpus, cpu_model, memory, usable_cpus
from ...report.load_report import human_bytes
from ...settings import load_settings
from ...transfer.window.meeting import meeting_directory, window_bytes
from .finding import Finding

_AREA = "machine"
_FEW_FILES = 1024
_LITTLE_MEMORY = 2 << 30
_LITTLE_SHARED_MEMORY = 256 << 20
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def check_machine() -> Iterator[Finding]:
    """The resources that limit whether a model loads, and how fast."""
    yield _cpus()
    yield _memory()
    yield _descriptors()
    yield _huge_pages()
    yield _shared_memory()
    yield _window()
    yield _temporary_files()


def _cpus() -> Finding:
    usable, quota = usable_cpus(), cgroup_cpus()
    value = f"{cpu_model()}, {usable} of {os.cpu_count()} usable"
    if quota is None:
        return Finding(_AREA, "CPUs", "ok", f"{value}, no cgroup quota")
    value = f"{value}, cgroup quota {quota:g}"
    if quota < usable:
        repair = (
            "threads pause when the quota is used up: raise the CPU limit, or lower loader.threads and OMP_NUM_THREADS"
        )
        return Finding(_AREA, "CPUs", "warn", value, repair)
    return Finding(_AREA, "CPUs", "ok", value)


def _memory() -> Finding:
    found = memory()
    limit = "no cgroup limit" if found.limit is None else f"cgroup limit {human_bytes(found.limit)}"
    value = f"{human_bytes(found.available)} available of {human_bytes(found.total)}, {limit}"
    if found.available < _LITTLE_MEMORY:
        return Finding(_AREA, "memory", "warn", value, "lower loader.buffer_bytes, or give the container more")
    return Finding(_AREA, "memory", "ok", value)


def _descriptors() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    value = f"{_limit(soft)} at once, {_limit(hard)} at most"
    if soft != resource.RLIM_INFINITY and soft < _FEW_FILES:
        return Finding(_AREA, "open files", "warn", value, f"raise it: ulimit -n {max(_FEW_FILES, 65536)}")
    return Finding(_AREA, "open files", "ok", value)


def _limit(number: int) -> str:
    return "no limit" if number == resource.RLIM_INFINITY else f"{number:,}"


def _huge_pages() -> Finding:
    name = "transparent huge pages"
    try:
        found = re.search(r"\[(\w+)\]", _HUGE_PAGES.read_text())
    except OSError:
        return Finding(
            _AREA, name, "warn", "the kernel does not report a mode", "reading into fresh memory may be slower"
        )
    mode = found[1] if found else "unknown"
    if mode in ("always", "madvise"):
        return Finding(_AREA, name, "ok", mode)
    repair = f"reading into fresh memory is slower without huge pages: echo madvise > {_HUGE_PAGES}"
    return Finding(_AREA, name, "warn", mode, repair)


def _window() -> Finding:
    name = "what ranks share"
    settings = load_settings().settings.loader
    if settings.share == "off":
        return Finding(_AREA, name, "absent", "nothing: loader.share is off")
    directory, why_not = meeting_directory()
    if directory is None:
        repair = "remove it, or set XDG_RUNTIME_DIR to a directory of this user's: else each rank reads for itself"
        return Finding(_AREA, name, "warn", why_not, repair)
    size = human_bytes(window_bytes(int(settings.share_bytes)))
    return Finding(_AREA, name, "ok", f"up to {size} while they load; they meet in {directory}")


def _temporary_files() -> Finding:
    name = "temporary files"
    try:
        place = tempfile.gettempdir()
    except OSError as error:
        repair = "engines and compilers need a directory for temporary files: set TMPDIR to one that can be written"
        return Finding(_AREA, name, "warn", str(error.strerror or error), repair)
    return Finding(_AREA, name, "ok", place)


def _shared_memory() -> Finding:
    name = "/dev/shm"
    try:
        status = os.statvfs(name)
    except OSError as error:
        return Finding(
            _AREA, name, "warn", str(error.strerror), "engines of several processes need it: mount a tmpfs there"
        )
    free = status.f_bavail * status.f_frsize
    value = f"{human_bytes(free)} free"
    if free < _LITTLE_SHARED_MEMORY:
        repair = (
            "engines of several processes need more: docker run --ipc=host, or an emptyDir of medium Memory at /dev/shm"
        )
        return Finding(_AREA, name, "warn", value, repair)
    return Finding(_AREA, name, "ok", value)
