"""How a file is read is picked by where its bytes are."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from engine_loader import residency
from engine_loader.settings import LoaderSettings
from engine_loader.sources.posix import PosixFile, PosixSource
from engine_loader.transfer import cpus as thread_counts
from engine_loader.transfer import modes
from engine_loader.transfer.constructor import make_readers
from engine_loader.transfer.cpus import cpus_of_node, default_threads, local_cpus, ranks_of_node, waiting_threads
from engine_loader.transfer.modes import choose_mode, resident_share
from engine_loader.transfer.native import native_readers
from engine_loader.transfer.native.native_readers import NativeReaders
from engine_loader.transfer.placement import node_of_gpu, node_of_storage
from engine_loader.transfer.plan import extent, make_extents

MakeFile = Callable[[int], PosixFile]
EXT4 = 0xEF53
FUSE = 0x65735546


@pytest.fixture
def share(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, float | None], None]:
    """Sets what the file system and the cached share seem to be."""

    def pretend(kind: int, cached: float | None) -> None:
        monkeypatch.setattr(residency, "_magic_number", lambda _: kind)
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
        monkeypatch.setattr(residency, "_cachestat", lambda *_: None)
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
    monkeypatch.setattr(residency, "_cachestat", lambda *_: None)
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


def test_ranks_share_the_cpus_and_the_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    usable, parent = 64, 64
    quota: float | None = None
    monkeypatch.setattr(thread_counts, "usable_cpus", lambda: usable)
    monkeypatch.setattr(thread_counts, "_cpus_of_parent", lambda: parent)
    monkeypatch.setattr(thread_counts, "_quota", lambda: quota)
    assert [default_threads(ranks=ranks) for ranks in (1, 8, 100)] == [16, 8, 1]
    assert default_threads(frozenset(range(32)), ranks=8) == 8
    quota = 12.0
    assert default_threads(ranks=8) == 2
    usable, quota = 8, None  # bound to an eighth of what the process that started it has
    assert default_threads(ranks=8) == 8


@pytest.mark.parametrize(
    ("threads", "io_bytes", "ranks", "expected"),
    [
        (2, 4 << 20, 1, (8, 64)),
        (16, 4 << 20, 1, (16, 64)),
        (2, 4 << 20, 8, (2, 8)),
        (2, 64 << 20, 1, (8, 8)),
        (2, 16 << 20, 1, (8, 16)),
    ],
)
def test_reads_in_flight_are_bounded_by_their_bytes_and_shared(
    threads: int, io_bytes: int, ranks: int, expected: tuple[int, int]
) -> None:
    assert waiting_threads(threads, io_bytes, ranks) == expected


def test_the_ranks_of_a_node_are_what_the_launcher_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert ranks_of_node() == 1
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 16)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert ranks_of_node() == 16
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert ranks_of_node() == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert ranks_of_node() == 4


def test_a_setting_of_the_io_size_holds_for_direct_reads(make_file: MakeFile) -> None:
    file = make_file(32 << 20)
    reads = {}
    for io_bytes in (None, "2MiB", "8MiB"):
        options = {"read_mode": "direct", "threads": 1} | ({} if io_bytes is None else {"io_bytes": io_bytes})
        readers = make_readers(LoaderSettings(**options))
        to = np.empty(file.size, np.uint8)
        readers.submit([file], make_extents([extent(0, 0, file.size, to.ctypes.data)])).wait()
        assert to.tobytes() == Path(file.path).read_bytes()
        reads[io_bytes] = readers.statistics().reads
        readers.close()
    assert reads == {None: 22, "2MiB": 16, "8MiB": 4}


@pytest.mark.parametrize(("kind", "remote"), [(EXT4, False), (0x6969, True), (0x0BD00BD0, True)])
def test_network_file_systems_are_read_in_larger_pieces(
    share: Callable[[int, float | None], None], make_file: MakeFile, kind: int, remote: bool
) -> None:
    file = make_file(24 << 20)
    share(kind, 0.0)
    assert choose_mode(file).remote is remote
    to = np.empty(file.size, np.uint8)
    with contextlib.closing(NativeReaders(1)) as readers:
        readers.submit([file], make_extents([extent(0, 0, file.size, to.ctypes.data)])).wait()
        assert readers.statistics().reads == (6 if remote else 16)
    assert to.tobytes() == Path(file.path).read_bytes()


def test_the_node_of_a_device_is_found(tmp_path: Path, make_file: MakeFile, monkeypatch: pytest.MonkeyPatch) -> None:
    fd = make_file(10).fileno()
    assert fd is not None
    number = os.fstat(fd).st_dev
    card = tmp_path / "devices" / "pci0000:17" / "0000:17:00.0"
    (card / "nvme" / "nvme0n1").mkdir(parents=True)
    (card / "numa_node").write_text("1\n")
    (tmp_path / "dev" / "block").mkdir(parents=True)
    (tmp_path / "dev" / "block" / f"{os.major(number)}:{os.minor(number)}").symlink_to(card / "nvme" / "nvme0n1")
    (tmp_path / "bus" / "pci" / "devices").mkdir(parents=True)
    (tmp_path / "bus" / "pci" / "devices" / "0000:17:00.0").symlink_to(card)
    assert node_of_storage(fd, tmp_path) == 1
    properties = SimpleNamespace(pci_domain_id=0, pci_bus_id=0x17, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    assert node_of_gpu(0, tmp_path) == 1
    (card / "numa_node").write_text("-1\n")
    assert node_of_storage(fd, tmp_path) is None and node_of_gpu(0, tmp_path) is None


def test_threads_run_on_the_node_of_the_disk(make_file: MakeFile, monkeypatch: pytest.MonkeyPatch) -> None:
    cpus = sorted(os.sched_getaffinity(0))
    nodes = {0: frozenset(cpus[:1]), 1: frozenset(cpus[1:])}
    monkeypatch.setattr(native_readers, "local_cpus", lambda: nodes[0])
    monkeypatch.setattr(native_readers, "cpus_of_node", nodes.get)
    file = make_file(1 << 20)
    for node, expected in ((1, nodes[1]), (0, nodes[0]), (None, nodes[0])):
        if not expected:
            continue
        monkeypatch.setattr(native_readers, "node_of_storage", lambda _, node=node: node)
        to = np.empty(file.size, np.uint8)
        with contextlib.closing(NativeReaders(1, read_mode="direct")) as readers:
            readers.submit([file], make_extents([extent(0, 0, file.size, to.ctypes.data)])).wait()
            assert _cpus_of_readers() == {expected}


def _cpus_of_readers() -> set[frozenset[int]]:
    tasks = [path for path in Path("/proc/self/task").iterdir() if (path / "comm").read_text().startswith("el-read")]
    return {frozenset(os.sched_getaffinity(int(path.name))) for path in tasks}


def test_threads_stay_on_one_of_several_nodes(tmp_path: Path) -> None:
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        pytest.skip("one CPU only")
    for node, own in enumerate((cpus[:1], cpus[1:])):
        (tmp_path / f"node{node}").mkdir()
        (tmp_path / f"node{node}" / "cpulist").write_text(",".join(map(str, own)) + "\n")
    found = local_cpus(tmp_path)
    assert found in (frozenset(cpus[:1]), frozenset(cpus[1:]))
    assert cpus_of_node(1, tmp_path) == frozenset(cpus[1:])
    assert cpus_of_node(None, tmp_path) is cpus_of_node(7, tmp_path) is None
    assert local_cpus(tmp_path / "node0") is None  # no nodes below it
    thread_counts._cpus_by_node.cache_clear()
    (tmp_path / "node0" / "cpulist").write_text(f"{cpus[0]}-{cpus[-1]}\n")
    (tmp_path / "node1" / "cpulist").write_text("\n")  # a node of memory only
    assert local_cpus(tmp_path) is None
