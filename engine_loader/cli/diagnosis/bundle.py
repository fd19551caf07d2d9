"""``doctor --bundle``: what a support engineer asks for, in one archive, without secrets.

Of the environment, values are in it for variables of engines and their libraries alone, and none whose name suggests a
secret. What such a variable holds is taken out of every text, too, wherever it stands; so is what looks like a
password, a token or a key. No file's content is in it but events of starts.
"""

from __future__ import annotations

import io
import json
import os
import platform
import re
import tarfile
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

_VALUES_OF = re.compile(
    "ENGINE_LOADER_|VLLM_|SGLANG_|TORCH|PYTORCH_|TRITON_|CUDA_|NVIDIA_VISIBLE|HIP_|ROCR_|NCCL_|GLOO_|OMP_|MKL_|KMP_"
    "|FLASHINFER_|DG_JIT_|HF_HOME|HF_HUB_OFFLINE|HF3FS_|FASTSAFETENSORS_|B10FS_|BASETEN_FS_|LOCAL_WORK_DIR$|MAX_|MIN_"
    "|XDG_CACHE_HOME$|TMPDIR$|LD_PRELOAD$|LD_LIBRARY_PATH$|WORLD_SIZE$|LOCAL_WORLD_SIZE$|RANK$|LOCAL_RANK$"
)
_STARTS = 3
_SHORTEST_SECRET = 6
_LEFT_OUT = "***"


def write_bundle(path: Path, findings: list[dict[str, Any]]) -> list[str]:
    """Write the archive, a .tar.gz that this user alone can read.

    Args:
        path: the file.
        findings: those of the doctor.

    Returns:
        The names of its files.

    Raises:
        OSError: it cannot be written.
    """
    hidden = _Hidden(os.environ)
    names = []
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file, tarfile.open(fileobj=file, mode="w:gz") as archive:
        os.fchmod(descriptor, 0o600)  # the file may have been there
        for name, text in _files(findings):
            data = hidden.without(text).encode(errors="backslashreplace")
            entry = tarfile.TarInfo(f"engine-loader-bundle/{name}")
            entry.size, entry.mode, entry.mtime = len(data), 0o600, int(time.time())
            archive.addfile(entry, io.BytesIO(data))
            names.append(name)
    return names


class _Hidden:
    """What must not be told: the values of variables whose names suggest a secret."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        from ...compile_cache.verdict.factors import without_secrets

        told = without_secrets(dict(environ))
        values = {value for name, value in environ.items() if name not in told and len(value) >= _SHORTEST_SECRET}
        # As they stand in JSON, too.
        values |= {json.dumps(value)[1:-1] for value in values}
        self._values = sorted(values, key=len, reverse=True)

    def without(self, text: str) -> str:
        from ...escaping import redacted

        for value in self._values:
            text = text.replace(value, _LEFT_OUT)
        # By lines: one that holds a private key must not take the others with it.
        return "\n".join(redacted(line) for line in text.split("\n"))


def _files(findings: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """(name, text) of every file of the archive."""
    yield "doctor.json", _json(findings)
    yield "settings.json", _settings()
    yield "environment.json", _environment(os.environ)
    yield (
        "packages.txt",
        "\n".join(sorted({f"{one.name}=={one.version}" for one in distributions() if one.name})) + "\n",
    )
    yield "machine.json", _machine()
    yield from _starts()


def _settings() -> str:
    from ...errors import SettingsError
    from ...settings import describe_settings, load_settings, setting_value, show_value

    try:
        resolved = load_settings()
    except SettingsError as error:
        return _json({"error": str(error)})
    rows = {}
    for name, default, _ in describe_settings():
        value = show_value(setting_value(resolved.settings, name))
        rows[name] = {"value": value, "default": default, "origin": resolved.origins.get(name, "default")}
    return _json(rows)


def _environment(environ: Mapping[str, str]) -> str:
    from ...compile_cache.verdict.factors import without_secrets

    told = without_secrets({name: value for name, value in environ.items() if _VALUES_OF.match(name)})
    return _json({name: told.get(name, _LEFT_OUT) for name in sorted(environ)})


def _machine() -> str:
    from ...machine import cgroup_cpus, cpu_model, memory, mounts, usable_cpus

    found = memory()
    return _json(
        {
            "cpu": cpu_model(),
            "cpus": usable_cpus(),
            "cpu_quota": cgroup_cpus(),
            "memory_bytes": found.total,
            "memory_available_bytes": found.available,
            "memory_limit_bytes": found.limit,
            "kernel": platform.release(),
            "python": platform.python_version(),
            "load_average": os.getloadavg(),
            # Options of network file systems name users and tickets.
            "mounts": [{"point": mount.point, "kind": mount.kind, "source": mount.source} for mount in mounts()],
        }
    )


def _starts() -> Iterator[tuple[str, str]]:
    from ...errors import EngineLoaderError
    from ...report.reading.account import account_of
    from ...report.starts import starts_in
    from ...settings import load_settings

    try:
        directory = load_settings().settings.report.directory
        starts = starts_in(directory)[-_STARTS:]
    except (EngineLoaderError, OSError):
        return
    for start in starts:
        try:
            yield f"starts/{start.name}/report.json", _json(account_of(start).to_json())
            for path in sorted(start.glob("*.json*")):
                yield f"starts/{start.name}/{path.name}", path.read_text(errors="replace")
        except (EngineLoaderError, OSError):
            continue


def _json(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"
