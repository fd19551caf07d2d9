"""The doctor looks at what the machine has for an engine."""

import os
import resource
import stat
from pathlib import Path

import pytest

from engine_loader.cli.diagnosis import resources
from engine_loader.machine import Memory


def test_a_quota_below_the_cpus_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "usable_cpus", lambda: 64)
    monkeypatch.setattr(resources, "cgroup_cpus", lambda: 2.5)
    finding = resources._cpus()
    assert finding.status == "warn"
    assert "cgroup quota 2.5" in finding.value


def test_little_memory_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "memory", lambda: Memory(64 << 30, 1 << 30, 4 << 30))
    finding = resources._memory()
    assert finding.status == "warn"
    assert finding.value == "1.00 GiB available of 64.0 GiB, cgroup limit 4.00 GiB"


def test_few_descriptors_are_a_warning() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
    try:
        finding = resources._descriptors()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert finding.status == "warn"
    assert finding.value.startswith("256 at once, ")
    assert "ulimit -n" in finding.repair


@pytest.mark.parametrize(("text", "expected"), [("always [madvise] never", "ok"), ("always madvise [never]", "warn")])
def test_huge_pages(text: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "enabled").write_text(text)
    monkeypatch.setattr(resources, "_HUGE_PAGES", tmp_path / "enabled")
    assert resources._huge_pages().status == expected


def test_a_machine_has_all_of_these() -> None:
    names = [finding.name for finding in resources.check_machine()]
    assert names[:4] == ["CPUs", "memory", "open files", "transparent huge pages"]
    assert names[4:] == ["/dev/shm", "what ranks share", "temporary files"]
    assert stat.S_ISDIR(os.stat("/dev/shm").st_mode)
