"""What the machine gives, read from a /proc and cgroups that are written for the test."""

import os
from pathlib import Path

import pytest

from engine_loader.machine import (
    CpuTime,
    cgroup_cpus,
    cpu_model,
    cpu_time,
    has_accelerator,
    memory,
    mount_of,
    mounts,
    usable_cpus,
)

MEMINFO = "MemTotal:       100000 kB\nMemFree:         10000 kB\nMemAvailable:    80000 kB\n"


def make_proc(root: Path, mountinfo: str = "", cgroup: str = "") -> Path:
    proc = root / "proc"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(MEMINFO)
    (proc / "self" / "mountinfo").write_text(mountinfo)
    (proc / "self" / "cgroup").write_text(cgroup)
    return proc


def version_2(tmp_path: Path, own: str = "/pod/container") -> tuple[Path, Path]:
    """A /proc and the mount point of its cgroups."""
    point = tmp_path / "cgroup"
    (point / "pod" / "container").mkdir(parents=True)
    return make_proc(tmp_path, f"30 1 0:1 / {point} rw - cgroup2 cgroup2 rw\n", f"0::{own}\n"), point


def test_this_machine_has_processors_and_memory() -> None:
    assert 1 <= usable_cpus() <= (os.cpu_count() or 1)
    found = memory()
    assert 0 < found.available <= found.total
    assert cpu_model()


def test_without_limits_the_machines_memory_counts(tmp_path: Path) -> None:
    proc = make_proc(tmp_path)
    found = memory(proc)
    assert (found.total, found.available, found.limit) == (100000 << 10, 80000 << 10, None)
    assert cgroup_cpus(proc) is None


def test_the_tightest_limit_of_all_groups_above_counts(tmp_path: Path) -> None:
    proc, point = version_2(tmp_path)
    (point / "pod" / "cpu.max").write_text("150000 100000\n")
    (point / "pod" / "container" / "cpu.max").write_text("max 100000\n")
    (point / "pod" / "memory.max").write_text(f"{50 << 20}\n")
    (point / "pod" / "memory.current").write_text(f"{40 << 20}\n")
    (point / "pod" / "memory.stat").write_text(f"anon 1\ninactive_file {15 << 20}\n")
    (point / "pod" / "container" / "memory.max").write_text("max\n")
    assert cgroup_cpus(proc) == 1.5
    found = memory(proc)
    # What the page cache holds is given up when memory is asked for.
    assert (found.available, found.limit) == (25 << 20, 50 << 20)


def test_a_container_that_sees_only_its_own_group(tmp_path: Path) -> None:
    proc, point = version_2(tmp_path, own="/host/path/that/is/not/here")
    (point / "cpu.max").write_text("200000 100000\n")
    assert cgroup_cpus(proc) == 2.0


def test_cgroups_of_version_1(tmp_path: Path) -> None:
    cpu, mem = tmp_path / "cpu", tmp_path / "memory"
    (cpu / "pod").mkdir(parents=True)
    (mem / "pod").mkdir(parents=True)
    mountinfo = f"30 1 0:1 / {cpu} rw - cgroup cgroup rw,cpu,cpuacct\n31 1 0:2 / {mem} rw - cgroup cgroup rw,memory\n"
    proc = make_proc(tmp_path, mountinfo, "3:memory:/pod\n2:cpu,cpuacct:/pod\n")
    (cpu / "pod" / "cpu.cfs_quota_us").write_text("50000\n")
    (cpu / "pod" / "cpu.cfs_period_us").write_text("100000\n")
    (cpu / "cpu.cfs_quota_us").write_text("-1\n")
    (cpu / "cpu.cfs_period_us").write_text("100000\n")
    (mem / "pod" / "memory.limit_in_bytes").write_text(f"{30 << 20}\n")
    (mem / "pod" / "memory.usage_in_bytes").write_text(f"{10 << 20}\n")
    (mem / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert cgroup_cpus(proc) == 0.5
    found = memory(proc)
    assert (found.available, found.limit) == (20 << 20, 30 << 20)


def test_the_mount_of_a_path_is_the_nearest_and_of_two_at_one_place_the_later(tmp_path: Path) -> None:
    models = tmp_path / "my models"
    models.mkdir()
    escaped = str(models).replace(" ", "\\040")
    mountinfo = (
        "20 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw\n"
        f"21 20 0:5 / {escaped} rw - nfs4 old:/models rw\n"
        f"22 21 0:6 / {escaped} ro,noexec - nfs4 new:/models rw\n"
        "a line that is none\n"
    )
    proc = make_proc(tmp_path, mountinfo)
    found = mount_of(models / "not" / "there" / "yet", proc)
    assert found is not None
    assert (found.point, found.kind, found.source) == (str(models), "nfs4", "new:/models")
    assert {"ro", "noexec"} <= found.options
    other = mount_of("/etc", proc)
    assert other is not None and other.kind == "ext4"
    assert len(mounts(proc)) == 3


def test_a_neighbour_whose_name_begins_alike_is_not_inside(tmp_path: Path) -> None:
    proc = make_proc(tmp_path, "20 1 8:1 / / rw - ext4 d rw\n21 20 0:5 / /mnt/model rw - nfs4 s:/ rw\n")
    found = mount_of("/mnt/models/llama", proc)
    assert found is not None and found.kind == "ext4"


def test_the_share_of_the_cpus_that_others_took() -> None:
    before = CpuTime(total=100.0, busy=40.0, own=10.0)
    assert CpuTime(total=120.0, busy=55.0, own=20.0).others_share_since(before) == 0.25
    assert CpuTime(total=120.0, busy=40.0, own=11.0).others_share_since(before) == 0.0
    assert before.others_share_since(before) == 0.0


def test_the_kernel_counts_our_own_time_too() -> None:
    before = cpu_time()
    end = before.own + 0.2
    while cpu_time().own < end:
        pass
    after = cpu_time()
    assert after.busy > before.busy
    assert after.total >= after.busy


@pytest.mark.parametrize(
    ("names", "seen"),
    [([], False), (["null", "dri/card0", "nvidiactl"], False), (["nvidia0"], True), (["dri/renderD128"], True)],
)
def test_an_accelerator_is_seen_by_its_device(tmp_path: Path, names: list[str], seen: bool) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert has_accelerator(tmp_path) is seen
