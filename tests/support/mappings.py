"""What the kernel says of a process's memory."""

from pathlib import Path

import pytest


def need_huge_pages() -> None:
    """Skip the test where the system has none to give."""
    if "[never]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text():
        pytest.skip("this system has no transparent huge pages")


def vm_flags(where: int) -> list[str]:
    """The flags of the mapping that holds an address, from /proc/self/smaps."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            begin, end = (int(part, 16) for part in first.split("-"))
            inside = begin <= where < end
        elif inside and first == "VmFlags:":
            return line.split()[1:]
    return []


def mapped_of_shared_memory(process: int) -> set[str]:
    """The names in /dev/shm, deleted ones marked as the kernel marks them, that a process has mapped; none when it has
    ended, or is another user's."""
    try:
        lines = Path(f"/proc/{process}/maps").read_text(errors="replace").splitlines()
    except OSError:
        return set()
    return {name for line in lines if (name := line.partition("/dev/shm/")[2])}
