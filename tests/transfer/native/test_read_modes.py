"""How a file is read is picked by where its bytes are."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from engine_loader.sources.posix import PosixFile, PosixSource
from engine_loader.transfer import cpus as thread_counts
from engine_loader.transfer import modes
from engine_loader.transfer.cpus import default_threads, local_cpus
from engine_loader.transfer.modes import choose_mode, resident_share

MakeFile = Callable[[int], PosixFile]
EXT4 = 0xEF53
FUSE = 0x65735546


@pytest.fixture
def share(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, float | None], None]:
    """Sets what the file system and the cached share seem to be."""

    def pretend(kind: int, cached: float | None) -> None:
        monkeypatch.setattr(modes, "_file_system", lambda _: kind)
        monkeypatch.setattr(modes, "resident_share", lambda *_: cached)

    return pretend


@pytest.mark.parametrize(
    ("kind", "cached", "name", "wide"),
    [
        (EXT4, 0.0, "direct", True),
        (EXT4, 0.5, "mixed", True),
        (EXT4, 1.0, "buffered", False),
        (EXT4, None, "buffered", True),
        (FUSE, 0.0, "buffered", True),
        (FUSE, 1.0, "buffered", False),
        (0x01021994, 0.0, "buffered", False),
        (0, 0.3, "buffered", True),
    ],
)
def test_the_mode_follows_the_file_system_and_the_page_cache(
    share: Callable[[int, float | None], None],
    make_file: MakeFile,
    kind: int,
    cached: float | None,
    name: str,
    wide: bool,
) -> None:
    share(kind, cached)
    mode = choose_mode(make_file(10))
    assert (mode.name, mode.wide) == (name, wide)
    assert mode.reason


def test_a_setting_overrides(share: Callable[[int, float | None], None], make_file: MakeFile) -> None:
    file = make_file(10)
    share(EXT4, 1.0)
    assert choose_mode(file, "direct").name == "direct"
    share(EXT4, 0.0)
    assert choose_mode(file, "buffered").name == "buffered"


def test_a_file_on_tmpfs_is_read_through_memory() -> None:
    if not os.path.isdir("/dev/shm"):
        pytest.skip("no /dev/shm")
    path = Path(f"/dev/shm/engine-loader-test-{os.getpid()}")
    path.write_bytes(b"abc")
    file = PosixSource().open(str(path))
    try:
        assert choose_mode(file, "direct").reason == "tmpfs lies in memory"
    finally:
        file.close()
        path.unlink()


@pytest.mark.parametrize("by_mincore", [False, True])
def test_the_resident_share_is_found(make_file: MakeFile, monkeypatch: pytest.MonkeyPatch, by_mincore: bool) -> None:
    if by_mincore:
        monkeypatch.setattr(modes, "_cachestat", lambda *_: None)
    file = make_file(96 << 20)
    fd = file.fileno()
    assert fd is not None
    assert resident_share(fd, file.size) > 0.98  # the kernel may take a page back at any moment
    os.posix_fadvise(fd, 0, file.size // 2, os.POSIX_FADV_DONTNEED)
    found = resident_share(fd, file.size)
    # Some file systems (tmpfs) keep what they were told to drop.
    assert found is not None and (found == 1.0 or 0.4 < found < 0.6)


def test_where_the_kernel_does_not_tell_the_share_is_unknown(
    make_file: MakeFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = make_file(10_000)
    fd = file.fileno()
    assert fd is not None
    monkeypatch.setattr(modes, "_cachestat", lambda *_: None)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert resident_share(fd, file.size) is None


def test_threads_follow_affinity_and_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    usable = 12
    quota: float | None = None
    monkeypatch.setattr(thread_counts, "usable_cpus", lambda: usable)
    monkeypatch.setattr(thread_counts, "_quota", lambda: quota)
    assert default_threads() == 12
    assert default_threads(frozenset(range(5))) == 5
    quota = 2.5
    assert default_threads() == 3
    quota = 0.1
    assert default_threads() == 1
    usable, quota = 200, None
    assert default_threads() == 16


def test_threads_stay_on_one_of_several_nodes(tmp_path: Path) -> None:
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        pytest.skip("one CPU only")
    for node, own in enumerate((cpus[:1], cpus[1:])):
        (tmp_path / f"node{node}").mkdir()
        (tmp_path / f"node{node}" / "cpulist").write_text(",".join(map(str, own)) + "\n")
    found = local_cpus(tmp_path)
    assert found in (frozenset(cpus[:1]), frozenset(cpus[1:]))
    assert local_cpus(tmp_path / "node0") is None  # no nodes below it
    thread_counts._cpus_by_node.cache_clear()
    (tmp_path / "node0" / "cpulist").write_text(f"{cpus[0]}-{cpus[-1]}\n")
    (tmp_path / "node1" / "cpulist").write_text("\n")  # a node of memory only
    assert local_cpus(tmp_path) is None
