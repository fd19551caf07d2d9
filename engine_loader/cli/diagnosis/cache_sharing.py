"""Checks the store of the shared compile cache, and the fix-ups of engines."""

from __future__ import annotations

import errno
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from ...compile_cache.cache_errors import CacheError
from ...compile_cache.space import free_bytes, mib
from ...compile_cache.stores.interface import Store
from ...compile_cache.stores.object_names import SAVING, UNFINISHED
from ...compile_cache.stores.opening import check_settings, open_store
from ...engines.common import torch_fixups
from ...engines.vllm import fixups as vllm_fixups
from ...errors import SettingsError
from ...home import nearest_parent
from ...report.load_report import human_bytes
from ...settings import CompileCacheSettings, LoaderSettings, load_settings
from ...sources.object_store.client import ObjectStoreOptions
from ...sources.registry import is_remote
from .finding import Finding, cause_and_repair, impatient, write_refused

_AREA = "compile cache"
_TRIAL_BYTES = 64 << 10
_WITHOUT = "engines start without a compile cache until this is repaired"
_NOT_AT_ALL = (
    "no engine starts with --load-format b10_3fs until this is repaired, or the cache is switched off: "
    "ENGINE_LOADER_COMPILE_CACHE__ENABLED=false"
)
_SAVES = "make room there or let this user write, name another compile_cache.directory, or set compile_cache.read_only"


def _store(settings: CompileCacheSettings) -> Iterator[Finding]:
    """Whether packs can be read from the store, and written to it if this machine saves."""
    try:
        began = time.monotonic()
        options = ObjectStoreOptions.from_settings(impatient(LoaderSettings()))
        store, trust = open_store(settings, options=options)
        packs = list(store.list())
        took_ms = (time.monotonic() - began) * 1000
        place = Path(store.description)
        if place.exists():
            trust.check_store(place)
        if settings.read_only:
            problem, tried = None, ""
        elif is_remote(settings.directory):
            problem, tried = None, f", {_round_trip(store):.0f} ms to write, read and delete"
        else:
            problem = _not_savable(place, settings)
            tried = "" if problem else f", {_file_round_trip(place):.0f} ms to write, read and delete"
            if (free := free_bytes(place)) is not None:
                tried += f", {human_bytes(free)} free"
    except (OSError, CacheError) as error:
        value, repair = cause_and_repair(error, "")
        yield Finding(_AREA, "store", "fail", value, "; ".join(filter(None, (repair, _consequence(settings)))))
        return
    size = mib(sum(pack.size for pack in packs))
    value = f"{store.description} ({len(packs)} packs, {size}, listed in {took_ms:.0f} ms{tried}, {trust.describe()})"
    if problem is not None:
        yield Finding(_AREA, "store", "fail", f"{value}: nothing can be saved: {problem}", _SAVES)
    else:
        yield Finding(_AREA, "store", "ok", value)
    for warning in trust.warnings:
        yield Finding(_AREA, "trust", "warn", warning, "see docs/security.md")


def _consequence(settings: CompileCacheSettings) -> str:
    """What a start makes of a store that cannot be used."""
    try:
        check_settings(settings)
    except SettingsError:
        return _NOT_AT_ALL
    return _WITHOUT


def _round_trip(store: Store) -> float:
    """Milliseconds in which a small object was written, read and deleted in a store of objects.

    Raises:
        OSError: one of these failed.
    """
    name = f"{SAVING}/{uuid.uuid4().hex}"  # as a save that is under way notes it; a left one is pruned
    began = time.monotonic()
    content = str(began).encode()
    store.create(name, content)
    try:
        if store.read(name, len(content)).content != content:
            raise OSError(errno.EIO, "other bytes were read than had been written", f"{store.description}/{name}")
    finally:
        store.delete(name)
    return (time.monotonic() - began) * 1000


def _file_round_trip(place: Path) -> float:
    """Milliseconds in which a small file was written, read and deleted in a store on a file system, or where it would
    be made.

    Raises:
        OSError: one of these failed.
    """
    # As an upload that is under way is named: one that is left is pruned, and read by nobody.
    path = os.path.join(nearest_parent(str(place)), f"{UNFINISHED}{uuid.uuid4().hex}")
    began = time.monotonic()
    content = os.urandom(_TRIAL_BYTES)
    flags = os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        with open(os.open(path, os.O_WRONLY | flags, 0o600), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # so that the storage is read
        if Path(path).read_bytes() != content:
            raise OSError(errno.EIO, "other bytes were read than had been written", path)
    finally:
        with suppress(OSError):
            os.unlink(path)
    return (time.monotonic() - began) * 1000


def _not_savable(place: Path, settings: CompileCacheSettings) -> str | None:
    """Why a save cannot write to a store on a file system, or None."""
    parent = nearest_parent(str(place))
    if refused := write_refused(parent):
        return f"{refused} in {parent}"
    free = free_bytes(place)
    if free is not None and free < settings.min_store_free_bytes:
        floor = mib(int(settings.min_store_free_bytes))
        return f"{mib(free)} are free, and {floor} are to stay free (compile_cache.min_store_free_bytes)"
    return None


def check_compile_cache() -> Iterator[Finding]:
    """The store, and each fix-up: whether it is needed and applied."""
    settings = load_settings().settings.compile_cache
    if not settings.enabled:
        yield Finding(_AREA, "state", "warn", "switched off", "set compile_cache.enabled: true")
        return
    yield from _store(settings)
    for fixup in (*vllm_fixups.FIXUPS, *torch_fixups.FIXUPS):
        state = fixup.state()
        if state == "needed" and not settings.fixups:
            repair = f"set compile_cache.fixups: true, or apply patches/{fixup.patch}"
            yield Finding(_AREA, f"fix-up {fixup.name}", "warn", f"needed, and switched off: {fixup.why}", repair)
        elif state == "needed":
            replaced, unread = " ".join(fixup.upstream.split()), fixup.unread()
            remark = f" ({unread})" if unread else ""
            detail = f"in {fixup.module} instead of `{replaced}`: {fixup.why}{remark}"
            yield Finding(_AREA, f"fix-up {fixup.name}", "ok", "applied when an engine starts", detail=detail)
        else:
            yield Finding(_AREA, f"fix-up {fixup.name}", "absent", f"not needed: {state}")
