"""Resources of this machine or container that the process can use: CPUs, memory, file systems."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_ACCELERATORS = ("nvidia[0-9]*", "kfd", "dri/renderD*", "accel/accel*", "davinci[0-9]*", "neuron[0-9]*", "xpu*")
_PROC = Path("/proc")
# cgroup v1 says "no limit" with the largest multiple of the page size.
_NO_LIMIT = 1 << 62


@dataclass(frozen=True)
class Mount:
    """A mounted file system.

    Attributes:
        point: the path of the mount point.
        kind: the type of the file system, e.g. "ext4", "nfs4", "fuse.juicefs".
        source: the device or the server's export.
        options: of the mount, e.g. {"ro", "relatime"}.
    """

    point: str
    kind: str
    source: str
    options: frozenset[str]
    _super_options: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Memory:
    """Bytes of memory.

    Attributes:
        total: of the machine.
        available: what this process can still allocate without swapping, within the limit of its cgroup.
        limit: of the process's cgroup; None: there is no limit.
    """

    total: int
    available: int
    limit: int | None


@dataclass(frozen=True)
class CpuTime:
    """Seconds of CPU time since the machine was started.

    Attributes:
        total: of all CPUs, busy and idle.
        busy: of all CPUs, busy with any process.
        own: of this process and its children that have ended.
    """

    total: float
    busy: float
    own: float

    def others_share_since(self, before: CpuTime) -> float:
        """The share (0 to 1) of the time since ``before`` that went to other processes."""
        total = self.total - before.total
        return min(1.0, max(0.0, (self.busy - before.busy - self.own + before.own) / total)) if total > 0 else 0.0


def cpu_model(proc: Path = _PROC) -> str:
    """The name of the processor in /proc/cpuinfo."""
    found = re.search(r"^(?:model name|Model|cpu model)\s*:\s*(.+)$", _text(proc / "cpuinfo"), re.MULTILINE)
    return found[1].strip() if found else "unknown processor"


def usable_cpus() -> int:
    """How many CPUs this process may run on (its affinity; a cgroup's quota is not counted)."""
    return len(os.sched_getaffinity(0))


def cgroup_cpus(proc: Path = _PROC) -> float | None:
    """The CPU time per second that the cgroup may use; None: there is no quota."""
    quotas = [_cpu_max(group) for group in _groups("cpu", proc)]
    return min((quota for quota in quotas if quota is not None), default=None)


def cpu_time(proc: Path = _PROC) -> CpuTime:
    """The CPU time of the machine and of this process up to now."""
    fields = [int(field) for field in _text(proc / "stat").partition("\n")[0].split()[1:9]] or [0] * 8
    _, _, _, idle, waiting, *_ = fields
    tick_s = 1 / os.sysconf("SC_CLK_TCK")
    return CpuTime(sum(fields) * tick_s, (sum(fields) - idle - waiting) * tick_s, sum(os.times()[:4]))


def has_accelerator(dev: Path = Path("/dev")) -> bool:
    """Whether this process sees a device with memory of its own: a GPU or the like."""
    return any(next(dev.glob(pattern), None) is not None for pattern in _ACCELERATORS)


def memory(proc: Path = _PROC) -> Memory:
    """The memory of the machine, and the part that this process can still allocate."""
    sizes = {key: int(kib) << 10 for key, kib in re.findall(r"^(\w+):\s+(\d+) kB$", _text(proc / "meminfo"), re.M)}
    available = sizes.get("MemAvailable", sizes.get("MemFree", 0))
    limit: int | None = None
    for group in _groups("memory", proc):
        here = _first_number(group, "memory.max", "memory.limit_in_bytes")
        if here is None or here >= _NO_LIMIT:
            continue
        used = _first_number(group, "memory.current", "memory.usage_in_bytes") or 0
        # The page cache counts as used, but the kernel frees it when processes need memory.
        cached = re.search(r"^(?:total_)?inactive_file (\d+)$", _text(group / "memory.stat"), re.M)
        available = min(available, max(0, here - used + (int(cached[1]) if cached else 0)))
        limit = here if limit is None else min(limit, here)
    return Memory(sizes.get("MemTotal", 0), available, limit)


def mounts(proc: Path = _PROC) -> list[Mount]:
    """Every mount that this process sees, in the order of mounting."""
    found = []
    for line in _text(proc / "self" / "mountinfo").splitlines():
        left, _, right = line.partition(" - ")
        first, last = left.split(" "), right.split(" ")
        if len(first) < 6 or len(last) < 3:
            continue
        options = frozenset(first[5].split(","))
        found.append(Mount(_unescaped(first[4]), last[0], _unescaped(last[1]), options, frozenset(last[2].split(","))))
    return found


def mount_of(path: str | os.PathLike[str], proc: Path = _PROC) -> Mount | None:
    """The mount that holds ``path``, or the nearest of its parents that exists; None if no mount is known."""
    real = os.path.realpath(path)
    best: Mount | None = None
    for mount in mounts(proc):
        inside = real == mount.point or real.startswith(mount.point.rstrip("/") + "/")
        # Of two mounts at one point, the later one is visible.
        if inside and (best is None or len(mount.point) >= len(best.point)):
            best = mount
    return best


def _groups(controller: str, proc: Path) -> Iterator[Path]:
    """The directories of this process's cgroup and of those above it that govern ``controller``."""
    for mount in mounts(proc):
        if mount.kind not in ("cgroup", "cgroup2") or (
            mount.kind == "cgroup" and controller not in mount._super_options
        ):
            continue
        root = Path(mount.point)
        group = root / _own_group(controller if mount.kind == "cgroup" else "", proc).lstrip("/")
        # In a container, the path can be that of the host: then only the root is visible.
        group = group if group.is_dir() else root
        yield group
        while group != root and root in group.parents:
            group = group.parent
            yield group


def _own_group(controller: str, proc: Path) -> str:
    for line in _text(proc / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return path
    return "/"


def _cpu_max(group: Path) -> float | None:
    quota, _, period = _text(group / "cpu.max").strip().partition(" ")
    if not quota:
        quota, period = _text(group / "cpu.cfs_quota_us").strip(), _text(group / "cpu.cfs_period_us").strip()
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() and int(period) else None


def _first_number(group: Path, *names: str) -> int | None:
    texts = (_text(group / name).strip() for name in names)
    return next((int(text) for text in texts if text.isdigit()), None)


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="surrogateescape")
    except OSError:
        return ""


def _unescaped(path: str) -> str:
    # The kernel writes a space in a path as \040.
    return re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), path)


def sync_directory(path: str | os.PathLike[str]) -> None:
    """Write a directory's entries to permanent storage, so that new names survive a power failure.

    Errors are ignored: some network file systems cannot sync a directory.
    """
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
