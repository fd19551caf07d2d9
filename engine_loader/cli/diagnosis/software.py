"""Checks software: versions, settings, the native library, and reading a small checkpoint."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Iterator

from ... import __version__
from ...errors import EngineLoaderError, SettingsError, TransferError
from .finding import Finding, installed_version

_AREA = "software"
_COMPILERS = ("c++", "g++", "clang++")


def check_versions() -> Iterator[Finding]:
    """Versions of Python, of this package in the source tree and as installed, of torch and of safetensors."""
    yield Finding(_AREA, "python", "ok", platform.python_version())
    installed = installed_version("engine-loader")
    if installed is None:
        repair = "pip install engine-loader: engines find only the plugin of an installed package"
        yield Finding(
            _AREA, "engine-loader", "warn", f"{__version__}, not installed: it runs from its source tree", repair
        )
    elif installed != __version__:
        repair = "install it again: engines use the entry points of the installed version"
        yield Finding(_AREA, "engine-loader", "warn", f"{__version__}, but {installed} is installed", repair)
    else:
        yield Finding(_AREA, "engine-loader", "ok", __version__)
    torch = installed_version("torch")
    if torch is None:
        yield Finding(_AREA, "torch", "fail", "not installed", "install the engine, which brings its own torch")
    else:
        yield Finding(_AREA, "torch", "ok", torch)
    safetensors = installed_version("safetensors")
    if safetensors is None:
        yield Finding(_AREA, "safetensors", "absent", "not installed; only benchmarks use it")
    else:
        yield Finding(_AREA, "safetensors", "ok", safetensors)


def check_bytecode() -> Iterator[Finding]:
    """Whether Python keeps what it compiles of the engines' modules, so that the next start does not do it again."""
    from ...start.bytecode import OFFER, why_not_kept

    name = "compiled modules (.pyc)"
    reasons = {module: why_not_kept(module) for module in ("torch", "vllm", "sglang")}
    found = {module: reason for module, reason in reasons.items() if reason is not None}
    if found:
        value = "; ".join(f"those of {module} are compiled in every start, for {why}" for module, why in found.items())
        yield Finding(_AREA, name, "warn", value, OFFER)
    else:
        yield Finding(_AREA, name, "ok", "kept")


def check_settings() -> Iterator[Finding]:
    """Whether the settings can be read, and how many are not the default."""
    from ...settings import load_settings

    try:
        origins = load_settings().origins
    except SettingsError as error:
        for line in str(error).splitlines():
            yield Finding(
                _AREA,
                "settings",
                "fail",
                line,
                "engine-loader settings shows them all; no engine starts with this setting",
            )
        return
    changed = ", ".join(f"{name} from {origin}" for name, origin in origins.items())
    yield Finding(_AREA, "settings", "ok", changed or "all at their defaults")


def check_native_library() -> Iterator[Finding]:
    """Whether the native library is available."""
    from ...settings import LoaderSettings
    from ...transfer.constructor import make_readers

    try:
        readers = make_readers(LoaderSettings(engine="cpp"))
    except TransferError as error:
        value = f"{error.message}; the pure-Python one serves instead"
        yield Finding(_AREA, "native library", "warn", value, _native_repair())
        return
    threads = readers.threads
    readers.close()
    yield Finding(_AREA, "native library", "ok", f"works, {threads} threads")


def check_reading() -> Iterator[Finding]:
    """Load a small checkpoint from every source and compare the bytes."""
    import tempfile
    from pathlib import Path

    content, expected = _tiny_checkpoint()
    try:
        with tempfile.TemporaryDirectory(prefix="engine-loader-doctor-") as directory:
            path = Path(directory) / "model.safetensors"
            path.write_bytes(content)
            yield _read_back("posix", expected, str(path))
    except OSError as error:
        yield Finding("sources", "posix", "warn", f"not tried: {error.strerror or error}", "set TMPDIR")
    yield _read_back("memory", expected, "model.safetensors", {"model.safetensors": content})


def _read_back(backend: str, expected: list[int], path: str, files: dict[str, bytes] | None = None) -> Finding:
    from ... import open_checkpoint

    try:
        with open_checkpoint(path, backend=backend, files=files) as checkpoint:
            got = checkpoint.get_tensor("x").tolist()
    except SettingsError:
        return Finding(
            "sources", backend, "warn", "not tried: the settings cannot be read", "see the finding of the settings"
        )
    except (EngineLoaderError, OSError) as error:
        return Finding(
            "sources", backend, "fail", str(error), "report this problem with the output of engine-loader doctor --json"
        )
    if got != expected:
        return Finding(
            "sources", backend, "fail", f"read {got} where {expected} was written", "this is a bug: report it"
        )
    return Finding("sources", backend, "ok", "a tensor was read back bit for bit")


def _tiny_checkpoint() -> tuple[bytes, list[int]]:
    import json
    import struct

    values = list(range(256))
    header = json.dumps({"x": {"dtype": "U8", "shape": [256], "data_offsets": [0, 256]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(values), values


def _native_repair() -> str:
    from ...transfer.native.library import INSTALL_AGAIN

    compiler = "" if any(map(shutil.which, _COMPILERS)) else "install a C++17 compiler (apt-get install g++), then "
    return f"the native engine stays fast while Python code is busy: {compiler}{INSTALL_AGAIN}"
