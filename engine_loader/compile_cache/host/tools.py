"""Compilers and C libraries of this machine: what host code is built with, and what it is linked to."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from .hashes import short_hash

_VERSION = re.compile(r"\d+(?:\.\d+)+")
_CUDA_VERSION = re.compile(r"\bV(\d+(?:\.\d+)+)")
_SECONDS = 10.0
_LIBSTDCXX = "libstdc++.so.6"


@cache
def cxx_compiler() -> str:
    """Kind and version of the C++ compiler that inductor would call: "gcc-12.2.0"; "none" where there is none."""
    first = _said(shlex.split(os.environ.get("CXX", "")) or ["g++"]).partition("\n")[0]
    if not first:
        return "none"
    version = _VERSION.search(first)
    return f"{'clang' if 'clang' in first else 'gcc'}-{version[0] if version else short_hash(first)}"


@cache
def cuda_tool(name: str) -> str:
    """The version of a program of the CUDA toolkit, ``nvcc`` or ``ptxas``: "13.0.48"; "none" where it is not installed.

    It is looked for where torch and FlashInfer look: CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda.
    """
    homes = [os.environ.get(variable) for variable in ("CUDA_HOME", "CUDA_PATH")]
    candidates = [os.path.join(home, "bin", name) for home in homes if home]
    found = [shutil.which(path) for path in (*candidates, name, f"/usr/local/cuda/bin/{name}")]
    command = next(filter(None, found), None)
    if command is None:
        return "none"
    said = _said([command])
    version = _CUDA_VERSION.search(said)
    return version[1] if version else short_hash(said) if said else "none"


def c_library() -> str:
    """The C library: "glibc-2.36"; "none" where it does not tell, as musl."""
    try:
        text = os.confstr("CS_GNU_LIBC_VERSION")
    except (ValueError, OSError):
        text = None
    return text.replace(" ", "-") if text else "none"


def cxx_library() -> str:
    """The version of libstdc++ that a process of this environment loads: "6.0.30"; "none" where it is not found.

    It is read from the name that the library's link points to, for loading it here could bring in another one than
    torch would.
    """
    for directory in _library_directories():
        path = Path(directory, _LIBSTDCXX)
        if path.exists():
            name = path.resolve().name
            return name.removeprefix("libstdc++.so.") if name != _LIBSTDCXX else short_hash(str(path.stat().st_size))
    return "none"


def _library_directories() -> Iterator[str]:
    yield from filter(None, os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep))
    yield os.path.join(sys.base_prefix, "lib")  # conda brings its own
    multiarch = sysconfig.get_config_var("MULTIARCH")
    for root in ("/lib", "/usr/lib"):
        if multiarch:
            yield f"{root}/{multiarch}"
    yield from ("/lib64", "/usr/lib64", "/usr/lib", "/lib")


def _said(command: list[str]) -> str:
    """What ``command --version`` prints; empty where it fails."""
    try:
        done = subprocess.run(
            [*command, "--version"], capture_output=True, text=True, errors="replace", timeout=_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
