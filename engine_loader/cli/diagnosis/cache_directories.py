"""Checks cache directories of engines: the path of each, whether it is writable, and its file system."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec

from ...compile_cache.directories import default_inductor_directory, private_place
from ...compile_cache.ownership import open_to_others
from ...home import nearest_parent, why_no_directory
from ...machine import mount_of
from ...report.load_report import human_bytes
from ...settings import load_settings
from .file_systems import is_network
from .finding import Finding, write_refused

_AREA = "caches"
_FEW_BYTES = 2 << 30


@dataclass(frozen=True)
class _Cache:
    """A cache directory of an engine, or of a library that engines use.

    Attributes:
        variable: the environment variable that sets the directory.
        default: returns the directory if the variable is not set.
        module: the directory is checked if this module is installed.
        compiled: True if shared libraries are loaded from the directory.
    """

    variable: str
    default: Callable[[], str]
    module: str
    compiled: bool = True


def _user_cache(*names: str) -> Callable[[], str]:
    return lambda: os.path.join(os.environ.get("XDG_CACHE_HOME") or _home(".cache"), *names)


def _home(*names: str) -> str:
    return os.path.join(os.path.expanduser("~"), *names)


def _triton() -> str:
    return os.path.join(os.environ.get("TRITON_HOME") or _home(), ".triton", "cache")


def _hub() -> str:
    return os.path.join(_resolved(_HF_HOME), "hub")


_HF_HOME = _Cache("HF_HOME", _user_cache("huggingface"), "huggingface_hub", compiled=False)
_CACHES = (
    _Cache("VLLM_CACHE_ROOT", _user_cache("vllm"), "vllm"),
    _Cache("SGLANG_CACHE_DIR", _user_cache("sglang"), "sglang"),
    _Cache("TORCHINDUCTOR_CACHE_DIR", default_inductor_directory, "torch"),
    _Cache("TRITON_CACHE_DIR", _triton, "triton"),
    _Cache("FLASHINFER_WORKSPACE_BASE", _home, "flashinfer"),
    _Cache("DG_JIT_CACHE_DIR", lambda: _home(".deep_gemm"), "deep_gemm"),
    _Cache("TVM_FFI_CACHE_DIR", lambda: _home(".cache", "tvm-ffi"), "tvm_ffi"),
    _HF_HOME,
    _Cache("HF_HUB_CACHE", _hub, "huggingface_hub", compiled=False),
)


def check_caches() -> Iterator[Finding]:
    """The cache directories of the installed engines and libraries."""
    for cache in _CACHES:
        if find_spec(cache.module) is not None:
            yield _check(cache)


def _resolved(cache: _Cache) -> str:
    return os.path.abspath(os.path.expanduser(os.environ.get(cache.variable) or cache.default()))


def _check(cache: _Cache) -> Finding:
    path = _resolved(cache)
    exists = os.path.exists(path)
    parent = path if exists else nearest_parent(path)
    repair = f"set {cache.variable} to a directory that this user can write to"
    if reason := why_no_directory(path):
        return Finding(_AREA, cache.variable, "fail", f"{path}: {reason}", repair)
    refused = write_refused(parent)
    if refused:
        return Finding(_AREA, cache.variable, "fail", f"{path}: {refused} in {parent}", repair)
    return _judge(cache, path, parent, exists)


def _judge(cache: _Cache, path: str, parent: str, exists: bool) -> Finding:
    reason = open_to_others(os.stat(path)) if exists and cache.compiled else None
    if reason and private_place(path) == path and load_settings().settings.compile_cache.trust == "owner":
        value = f"{path}: {reason}, and the compile cache neither fills nor saves what others may write"
        hint = f"name a directory below it: {cache.variable}={path.rstrip('/')}/private; vLLM and SGLang make one there"
        return Finding(_AREA, cache.variable, "warn", value, hint)
    status, mount = os.statvfs(parent), mount_of(parent)
    free = status.f_bavail * status.f_frsize
    kind = mount.kind if mount else "unknown file system"
    value = f"{path} ({'exists' if exists else 'will be made'}, writable, {human_bytes(free)} free, {kind})"
    if cache.compiled and mount is not None and "noexec" in mount.options:
        repair = f"set {cache.variable} to another file system: compiled kernels are loaded from it as shared libraries"
        return Finding(_AREA, cache.variable, "fail", f"{value}, mounted noexec", repair)
    if free < _FEW_BYTES or (status.f_files and not status.f_favail):
        return Finding(
            _AREA,
            cache.variable,
            "warn",
            f"{value}, nearly full",
            f"free space, or set {cache.variable} to another disk",
        )
    if cache.compiled and mount is not None and is_network(mount):
        repair = f"compilers write and lock many small files: set {cache.variable} to a local disk"
        return Finding(_AREA, cache.variable, "warn", value, repair)
    return Finding(_AREA, cache.variable, "ok", value)
