"""Which backend reads: FASTSAFETENSORS_BACKEND, or what this machine has of 3FS."""

from __future__ import annotations

import os

from ...errors import SettingsError
from ...settings import LoaderSettings, load_settings
from ...sources.threefs.discovery import find_client
from ...sources.threefs.discovery import is_available as _is_available
from ...sources.threefs.shared_library import ThreeFsError, find_library
from ...transfer.constructor import make_readers

BACKENDS = ("cpp", "python", "mock", "auto")


def get_backend() -> str:
    """What "auto" means: FASTSAFETENSORS_BACKEND, else the first of "cpp", "python" and "mock" that is available."""
    forced = forced_backend()
    if forced is not None:
        return forced
    try:
        client = find_client(load_settings().settings.loader.hf3fs_lib_dir)
    except ThreeFsError:
        return "mock"
    if client.library is None:
        return "python"
    readers = make_readers(LoaderSettings(engine="auto"))
    readers.close()
    return readers.name


def threefs_is_found() -> bool:
    """Whether 3FS's library, or its Python binding, is found and can be loaded."""
    try:
        find_client(load_settings().settings.loader.hf3fs_lib_dir)
    except ThreeFsError:
        return False
    return True


def is_available() -> bool:
    """Whether a read by USRBIO would work: the library loads, and 3FS is mounted and complete."""
    return get_backend() != "mock" and _is_available(lib_dir=load_settings().settings.loader.hf3fs_lib_dir)


def get_hf3fs_lib_path() -> str | None:
    """The 3FS library that is used, or None."""
    found = find_library(load_settings().settings.loader.hf3fs_lib_dir).path
    return None if found is None else str(found)


def extract_mount_point(path: str) -> str:
    """The 3FS mount that ``path`` is on; empty where it is on none."""
    try:
        client = find_client(load_settings().settings.loader.hf3fs_lib_dir)
    except ThreeFsError:
        return ""
    if not os.path.exists(path):
        return ""
    return client.binding.extract_mount_point(os.fspath(path)) or ""


def forced_backend() -> str | None:
    """What FASTSAFETENSORS_BACKEND says; None where it says nothing, or "auto".

    Raises:
        SettingsError: it is no backend.
    """
    forced = os.environ.get("FASTSAFETENSORS_BACKEND", "").strip().lower()
    if forced and forced not in BACKENDS:
        raise SettingsError(f"FASTSAFETENSORS_BACKEND={forced!r}: it is one of {', '.join(BACKENDS)}")
    return forced if forced and forced != "auto" else None


def settings_for(engine: str) -> LoaderSettings:
    """The settings of reader threads of a kind, or of any ("auto")."""
    return load_settings({"engine": engine}).settings.loader
