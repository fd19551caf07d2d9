"""For which environment a compile cache holds: readable parts and a short hash.

A part is in the key when a cache made with another value would be wrong or useless, and nothing else would notice:
engines leave the CPU's instruction set and the layout of devices out of their own keys, and a cache of a stronger CPU
ends in SIGILL. Nothing here imports torch, and nothing initialises CUDA (a process that did could not be forked any
more).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shlex
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from .gpu import Gpu, visible_gpus

_HASH_CHARS = 12
_MOST_NAME_CHARS = 160
# Other flags of a CPU (mitigations, virtualisation) change with its microcode, and nothing is compiled for them.
_INSTRUCTIONS = re.compile(
    "abm|adx|aes|amx|asimd|atomics|avx|bf16|bmi|clflushopt|clwb|cldemote|cmpxchg|cx16|crc32|f16c|fma|fp|fsgsbase|gfni|i8mm"
    "|lahf|lse|lzcnt|mmx|movbe|movdir|paca|pacg|pclmul|pmull|pni|popcnt|rdrand|rdseed|serialize|sha|sm[34]|sme|sse|ssse|sve"
    "|tbm|vaes|vpclmul|waitpkg|xop|xsave|3dnow"
)
_NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9.+-]+")  # "_" separates the parts
_NOT_IN_A_SCOPE = re.compile(r"[^A-Za-z0-9_.+-]+")


@dataclass(frozen=True)
class CacheKey:
    """The environment that a cache holds for, and what it is a cache of.

    Attributes:
        parts: name -> value, in the order in which they are shown.
        scope: caches of different scopes never meet; by default the model and the parallel layout.
    """

    parts: tuple[tuple[str, str], ...]
    scope: str

    @property
    def environment(self) -> str:
        """The parts as one readable name: ``torch-2.13.0_cuda-13.0_cc-9.0_…``."""
        return "_".join(f"{name}-{_plain(value)}" for name, value in self.parts)

    @property
    def hash(self) -> str:
        """A short hash of the exact parts."""
        return hashlib.sha256(json.dumps(self.parts).encode()).hexdigest()[:_HASH_CHARS]

    @property
    def prefix(self) -> str:
        """Where in a store the packs lie: ``<environment>_<hash>/<scope>``."""
        return f"{self.environment[:_MOST_NAME_CHARS]}_{self.hash}/{scope_name(self.scope)}"

    @property
    def short(self) -> str:
        """For a line of a log."""
        return f"{self.scope}, environment {self.hash}"

    def to_json(self) -> dict[str, Any]:
        return {"parts": [list(part) for part in self.parts], "scope": self.scope}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> CacheKey:
        return cls(tuple((str(name), str(text)) for name, text in value["parts"]), str(value["scope"]))

    def differs_from(self, other: CacheKey) -> list[tuple[str, str, str]]:
        """(part, value here, value there) for everything that differs; "none" where a part is missing."""
        here, there = dict(self.parts) | {"scope": self.scope}, dict(other.parts) | {"scope": other.scope}
        names = dict.fromkeys([*here, *there])
        return [(n, here.get(n, "none"), there.get(n, "none")) for n in names if here.get(n) != there.get(n)]


def environment_key(engine: Mapping[str, str], scope: str, *, devices: int | None = None) -> CacheKey:
    """The key of this machine and this installation.

    Args:
        engine: parts that the engine adds, in front: its name and version.
        scope: of the cache.
        devices: how many GPUs of this node the engine uses; None: all that are visible.
    """
    gpus = visible_gpus()
    torch = torch_versions()
    parts = {**engine, "torch": torch["torch"], "python": python_version()}
    parts |= _gpu_parts(gpus, torch, devices) if gpus and (torch["cuda"] or torch["hip"]) else _cpu_parts()
    parts["triton"] = _version("triton", "pytorch-triton", "triton-rocm", "pytorch-triton-rocm")
    return CacheKey(tuple(parts.items()), scope)


def module_version(module: str) -> str:
    """The version of an engine as it calls itself, read from its files: its distribution may have another name."""
    try:
        spec = importlib.util.find_spec(module)
        text = Path(spec.origin).with_name("_version.py").read_text() if spec is not None and spec.origin else ""
    except (OSError, ValueError):
        text = ""
    found = re.search(r"^(?:__version__\s*=\s*)?version\s*=\s*['\"]([^'\"]+)['\"]", text, re.MULTILINE)
    return found[1] if found else _version(module)


def python_version() -> str:
    """With the patch level: what is pickled or marshalled may differ by it."""
    return platform.python_version()


def scope_name(scope: str) -> str:
    """A scope as one part of a path."""
    plain = _NOT_IN_A_SCOPE.sub("-", scope).strip("-.") or "all"
    return plain if plain == scope and len(plain) <= 100 else f"{plain[:100]}-{short_hash(scope)}"


def short_hash(*texts: str) -> str:
    """Eight hexadecimal digits."""
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogateescape")).hexdigest()[:8]


def _gpu_parts(gpus: list[Gpu], torch: Mapping[str, str], devices: int | None) -> dict[str, str]:
    runtime = {"cuda": torch["cuda"]} if torch["cuda"] else {"rocm": torch["hip"]}
    # The index of a device is baked into what is compiled for it, so the number of devices is part of the key.
    count = len(gpus) if devices is None else devices
    kinds = dict.fromkeys((gpu.name, gpu.capability) for gpu in gpus)
    return runtime | {
        "cc": "+".join(dict.fromkeys(capability for _, capability in kinds)),
        "gpu": "+".join(dict.fromkeys(name for name, _ in kinds)),
        "devices": str(count),
    }


def _cpu_parts() -> dict[str, str]:
    return {
        "cpu": platform.machine(),
        "isa": _instruction_set(),
        "cxx": _compiler(),
        "threads": _threads(),
    }


def _threads() -> str:
    """Inductor bakes the number of threads into C++ kernels."""
    engines = ("VLLM_CPU_OMP_THREADS_BIND", "SGLANG_CPU_OMP_THREADS_BIND")
    bound = next(filter(None, (os.environ.get(name) for name in engines)), "auto")
    named = bound if bound != "auto" else os.environ.get("OMP_NUM_THREADS", "")
    return named or str(len(os.sched_getaffinity(0)))


@cache
def _instruction_set() -> str:
    """The widest vectors by name, and a hash of all instructions that a compiler may use here."""
    try:
        info = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return "unknown"
    found = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", info, re.MULTILINE)
    flags = sorted({flag for flag in found[1].split() if _INSTRUCTIONS.match(flag)}) if found else []
    widest = next((name for name in ("amx_tile", "avx512f", "avx2", "sve2", "sve", "asimd") if name in flags), "base")
    return f"{widest}+{short_hash(*flags)}"


@cache
def _compiler() -> str:
    """Name and version of the C++ compiler that inductor would call."""
    command = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    try:
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "none"
    first = done.stdout.partition("\n")[0]
    version = re.search(r"\d+(\.\d+)+", first)
    return f"{Path(command[0]).name}-{version[0] if version else short_hash(first)}"


@cache
def torch_versions() -> dict[str, str]:
    """torch's version and what it was built for, read from its files: importing it takes seconds."""
    versions = {"torch": _version("torch"), "cuda": "", "hip": ""}
    try:
        spec = importlib.util.find_spec("torch")
        text = Path(spec.origin).with_name("version.py").read_text() if spec is not None and spec.origin else ""
    except (OSError, ValueError):
        text = ""
    for name in ("cuda", "hip"):
        if found := re.search(rf"^{name}\s*(?::[^=]*)?=\s*['\"]([^'\"]+)['\"]", text, re.MULTILINE):
            versions[name] = found[1]
    if found := re.search(r"^__version__\s*=\s*['\"]([^'\"]+)['\"]", text, re.MULTILINE):
        versions["torch"] = found[1]  # with the local part (+cu130) that the metadata may lack
    return versions


def _version(*distributions: str) -> str:
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "none"


def _plain(text: str) -> str:
    return _NOT_IN_A_NAME.sub("-", text).strip("-") or "none"
