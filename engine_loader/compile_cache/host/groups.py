"""Facts of a host in groups: files that hold host code carry the group that they depend on, all others none.

With them apart from the key, a fleet with one kind of GPU on two kinds of processors shares its GPU kernels and keeps
its host libraries apart, and a new compiler on a host costs no GPU kernel.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from typing import Literal, NamedTuple

from ..gpu import cuda_driver_version
from .instructions import instruction_set
from .tools import c_library, cuda_tool, cxx_compiler, cxx_library

Code = Literal["any", "native", "toolkit"]
"""What a cached file depends on: no host; what a C++ compiler builds with -march=native; or, beside that, the CUDA
toolkit and its driver.
"""
_HASH_CHARS = 12


class HostGroup(NamedTuple):
    """Facts of a host that some files of a pack depend on: what reads them needs equal ones.

    Attributes:
        hash: of the facts.
        parts: name and value of each, in the order in which they are shown.
    """

    hash: str
    parts: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, parts: Mapping[str, str]) -> HostGroup:
        """The group of these facts."""
        rows = tuple(parts.items())
        return cls(hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:_HASH_CHARS], rows)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the parts: which kind of group it is."""
        return tuple(name for name, _ in self.parts)

    def differs_from(self, other: HostGroup) -> list[str]:
        """A line for each part that differs."""
        here, there = dict(self.parts), dict(other.parts)
        names = dict.fromkeys([*here, *there])
        return [
            f"{name} was {there.get(name, 'none')} there, is {here.get(name, 'none')} here"
            for name in names
            if here.get(name) != there.get(name)
        ]


HostGroups = Mapping[Code, HostGroup]
"""The groups of one host; empty where its facts are in the key, as for CPU engines."""


def native_parts() -> dict[str, str]:
    """What host code depends on that a C++ compiler builds here."""
    return {
        "isa": instruction_set(),
        "cxx": cxx_compiler(),
        "libc": c_library(),
        "libstdcxx": cxx_library(),
    }


@cache
def this_host() -> HostGroups:
    """The groups of this machine. Runs compilers for their versions, which takes some hundredths of a second."""
    native = native_parts()
    toolkit = {
        **native,
        "nvcc": cuda_tool("nvcc"),
        "ptxas": cuda_tool("ptxas"),
        # Without the build of the driver: what it runs and compiles is told by the version of CUDA that it implements.
        "driver": cuda_driver_version(),
    }
    return {"native": HostGroup.of(native), "toolkit": HostGroup.of(toolkit)}
