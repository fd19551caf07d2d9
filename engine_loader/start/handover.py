"""What a forked process gets from the one that asked for it, so that it is as if that one had started it."""

from __future__ import annotations

import os
import resource
import struct
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

_LENGTH = struct.Struct("Q")
_LIMITS = tuple(value for name, value in sorted(vars(resource).items()) if name.startswith("RLIMIT_"))


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


@dataclass(frozen=True)
class Surroundings:
    """What a process has from its parent beside memory and descriptors.

    Attributes:
        environ: its variables.
        cpus: on which it may run.
        umask: its umask.
        limits: of its resources, (soft, hard) by number.
    """

    environ: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    cpus: frozenset[int] = field(default_factory=lambda: frozenset(os.sched_getaffinity(0)))
    umask: int = field(default_factory=_umask)
    limits: Mapping[int, tuple[int, int]] = field(
        default_factory=lambda: {number: resource.getrlimit(number) for number in _LIMITS}
    )

    def apply(self) -> None:
        """Give them to this process."""
        for name in set(os.environ) - set(self.environ):
            del os.environ[name]
        for name, value in self.environ.items():
            # Only these: a variable that is set moves to another place, and setproctitle looks for all in the first.
            if os.environ.get(name) != value:
                os.environ[name] = value
        os.sched_setaffinity(0, self.cpus)
        os.umask(self.umask)
        for number, limits in self.limits.items():
            if resource.getrlimit(number) != limits:
                resource.setrlimit(number, limits)
        _seed_numpy()


Mend = Callable[[Mapping[str, str]], None]
"""Called in a child with the environment in which its modules were imported, when its own is in force."""


def _seed_numpy() -> None:
    """Python seeds its own generator after a fork; numpy's would be the same in all children."""
    random = sys.modules.get("numpy.random")
    if random is not None:
        random.seed()


def send_message(descriptor: int, message: bytes) -> None:
    """Write a message with its length before it."""
    view = memoryview(_LENGTH.pack(len(message)) + message)
    while view:
        view = view[os.write(descriptor, view) :]


def receive_message(descriptor: int) -> bytes:
    """Read what ``send_message`` wrote, and nothing behind it.

    Raises:
        EOFError: it ends before.
    """
    (length,) = _LENGTH.unpack(_receive(descriptor, _LENGTH.size))
    return _receive(descriptor, length)


def _receive(descriptor: int, length: int) -> bytes:
    parts: list[bytes] = []
    while length:
        part = os.read(descriptor, min(length, 1 << 20))
        if not part:
            raise EOFError("the process that asked for this one has ended")
        parts.append(part)
        length -= len(part)
    return b"".join(parts)
