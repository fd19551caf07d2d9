"""For which environment a compile cache holds: readable parts and a short hash.

A part is in the key when a cache made with another value would be wrong or useless, and nothing else would notice:
engines leave the CPU's instruction set and the layout of devices out of their own keys, and a cache of a stronger CPU
ends in SIGILL. Where there are GPUs, what only host code depends on is not in the key but in groups of host facts
(host/groups), so that a change of the host leaves GPU kernels in use.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..report.events import recorder
from ..report.phases import RESTORE_KEY
from .gpu import Gpu, visible_gpus
from .host.groups import HostGroups, native_parts, this_host
from .host.hashes import short_hash
from .host.threads import threads
from .host.versions import distribution_version, python_version, torch_versions

_HASH_CHARS = 12
_MOST_NAME_CHARS = 160
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

    @property
    def host_groups(self) -> HostGroups:
        """The groups of this machine's facts that files under this key may depend on; empty where the key itself has
        those facts.
        """
        return {} if any(name == "isa" for name, _ in self.parts) else this_host()

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
    with recorder.span(RESTORE_KEY):
        gpus = visible_gpus()
        torch = torch_versions()
        parts = {**engine, "torch": torch["torch"], "python": python_version()}
        parts |= _gpu_parts(gpus, torch, devices) if gpus and (torch["cuda"] or torch["hip"]) else _cpu_parts()
        parts["triton"] = distribution_version("triton", "pytorch-triton", "triton-rocm", "pytorch-triton-rocm")
    return CacheKey(tuple(parts.items()), scope)


def scope_name(scope: str) -> str:
    """A scope as one part of a path."""
    plain = _NOT_IN_A_SCOPE.sub("-", scope).strip("-.") or "all"
    return plain if plain == scope and len(plain) <= 100 else f"{plain[:100]}-{short_hash(scope)}"


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
    return {"cpu": platform.machine(), **native_parts(), "threads": threads()}


def _plain(text: str) -> str:
    return _NOT_IN_A_NAME.sub("-", text).strip("-") or "none"
