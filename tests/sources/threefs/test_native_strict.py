"""The native reader where the daemon is at its worst: holes, calls that do not return, stragglers, crashes."""

import errno
import os
import signal
import subprocess
import sys
import uuid
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine_loader.errors import TransferError
from engine_loader.sources.threefs import threefs_source
from engine_loader.sources.threefs.links import remove_dead
from engine_loader.sources.threefs.threefs_source import ThreeFsOptions
from engine_loader.transfer.plan import make_extents
from tests.support.threefs import Emulator
from tests.support.waiting import wait_for

from .conftest import KIB, MIB, SMALL, MakeReader

IMPATIENT = replace(SMALL, deadline_s=0.4, io_bytes=256 * KIB)


def test_data_that_only_the_mount_has_arrives(
    native_reader: MakeReader, emulator: Emulator, path: Path, content: bytes
) -> None:
    emulator.set("hole_at=1000000,hole_bytes=70000")
    reader = native_reader()
    assert reader.read(path) == [content]
    assert reader.readers.statistics().modes["buffered"] > 0


def test_a_hole_that_the_mount_fills_with_zeros_is_an_error(
    native_reader: MakeReader, emulator: Emulator, path: Path
) -> None:
    with path.open("r+b") as file:
        file.seek(1 * MIB)
        file.write(bytes(64 * KIB))
    emulator.set(f"hole_at={1 * MIB},hole_bytes={64 * KIB}")
    with pytest.raises(TransferError, match="ENODATA") as caught:
        native_reader(max_tries=2).read(path)
    assert (caught.value.file, caught.value.errno, caught.value.offset) == (str(path), errno.ENODATA, 1 * MIB)
    assert "hole" in str(caught.value)


def test_a_mount_that_hangs_while_rings_are_made_costs_the_deadline_and_no_thread(
    native_reader: MakeReader, emulator: Emulator, path: Path, content: bytes
) -> None:
    reader = native_reader(IMPATIENT)
    with closing(reader.open(path)) as file:
        target = np.zeros(file.size, np.uint8)
        plan = make_extents([(0, 1, 0, file.size, 0, target.ctypes.data, 0)])
        emulator.set("mount_hang=1")
        for _ in range(3):
            with pytest.raises(TransferError, match=r"no byte came for 0\.4 s") as caught:
                reader.readers.submit([file], plan, owner=target).wait()
            assert caught.value.file == str(path)
    assert emulator.count("blocked") <= 2, "one call for each ring, however often it is tried"
    emulator.set("reset")
    assert reader.read(path) == [content]


def test_a_mount_that_hangs_while_a_ring_is_given_up_stops_nothing_else(
    native_reader: MakeReader, emulator: Emulator, path: Path, content: bytes
) -> None:
    reader = native_reader(replace(IMPATIENT, rings=1))
    with closing(reader.open(path)) as file:
        target = np.zeros(file.size, np.uint8)
        plan = make_extents([(0, 1, 0, file.size, 0, target.ctypes.data, 0)])
        reader.readers.submit([file], plan, owner=target).wait()
        emulator.set("hang_every=2,mount_hang=1")
        for _ in range(2):
            with pytest.raises(TransferError, match="no byte came"):
                reader.readers.submit([file], plan, owner=target).wait()
    emulator.set("reset")
    assert reader.read(path) == [content]


def test_closing_waits_for_no_mount_that_hangs(native_reader: MakeReader, emulator: Emulator, path: Path) -> None:
    reader = native_reader(replace(SMALL, deadline_s=3600))
    with closing(reader.open(path)) as file:
        target = np.zeros(file.size, np.uint8)
        emulator.set("mount_hang=1")
        plan = make_extents([(0, 1, 0, file.size, 0, target.ctypes.data, 0)])
        reader.readers.submit([file], plan, owner=target)
        wait_for(lambda: emulator.count("blocked") > 0)
        reader.readers.close()
    emulator.set("reset")


def test_behind_one_slow_read_the_others_go_on(native_reader: MakeReader, emulator: Emulator, content: bytes) -> None:
    """Places of the queue are freed in order: a ring of twice the depth would stop after 8 reads."""
    big = emulator.mount / "big"
    big.write_bytes(content * 4)
    reader = native_reader(ThreeFsOptions(rings=1, depth=4, io_bytes=64 * KIB, deadline_s=60.0))
    reader.read(big)  # so many reads that only one of those below has a number that divides by that of the slow one
    with closing(reader.open(big)) as file:
        target = np.zeros(file.size, np.uint8)
        slow = emulator.count("ios") + 20
        emulator.set(f"hang_every={slow}")
        transfer = reader.readers.submit([file], make_extents([(0, 1, 0, file.size, 0, target.ctypes.data, 0)]))
        wait_for(lambda: transfer.bytes_done >= file.size - 64 * KIB)
        transfer.cancel()
    reader.readers.close()
    big.unlink()


def test_files_of_different_chunk_sizes_share_rings(
    native_reader: MakeReader, emulator: Emulator, path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = native_reader(SMALL)
    before = emulator.count("rings_made")
    for io_bytes in (512 * KIB, 384 * KIB, 512 * KIB, 128 * KIB):
        monkeypatch.setattr(threefs_source, "fit_io_bytes", lambda _wanted, _chunk, fitted=io_bytes: fitted)
        assert reader.read(path) == [content]
    assert emulator.count("rings_made") - before <= 2


@pytest.mark.parametrize("io_depth", [-4, -16])
def test_reads_go_to_the_daemon_as_jobs_of_several(
    native_reader: MakeReader, emulator: Emulator, path: Path, content: bytes, io_depth: int
) -> None:
    emulator.set("eager_every=0")
    reader = native_reader(replace(SMALL, io_bytes=64 * KIB, io_depth=io_depth))
    jobs, ios = emulator.count("batches"), emulator.count("ios")
    assert reader.read(path) == [content]
    assert emulator.count("batches") - jobs < (emulator.count("ios") - ios) / 2


def test_a_daemon_that_knows_no_negative_depth_is_read_from(
    native_reader: MakeReader, emulator: Emulator, path: Path, content: bytes
) -> None:
    emulator.set("no_negative_depth=1")
    assert native_reader().read(path) == [content]


def test_the_link_of_a_ring_that_could_not_be_made_is_removed(
    native_reader: MakeReader, emulator: Emulator, path: Path
) -> None:
    emulator.set(f"semaphore_error={errno.EMFILE}")
    with pytest.raises(TransferError, match="made no ring"):
        native_reader().read(path)
    wait_for(lambda: not os.listdir(emulator.mount / "3fs-virt" / "iovs"))


_CRASHES = """
import sys
from pathlib import Path
from tests.sources.threefs.conftest import Reader, ThreeFsSource, ThreeFsOptions, NativeReaders
reader = Reader(ThreeFsSource(ThreeFsOptions(rings=3, io_bytes=1 << 18, deadline_s=3600)), NativeReaders(2))
reader.read(Path(sys.argv[1]))
"""


@pytest.mark.parametrize("daemon_cleans_up", [True, False])
def test_a_crash_leaves_neither_rings_nor_buffers(
    native_reader: MakeReader, emulator: Emulator, path: Path, daemon_cleans_up: bool
) -> None:
    """By the daemon, since each ring's thread has the directory open; else by the next process that makes a ring."""
    environment = {**os.environ, **emulator.environment("hang_every=1", whole_mount=True)}
    child = subprocess.Popen([sys.executable, "-c", _CRASHES, str(path)], env=environment)
    links = emulator.mount / "3fs-virt" / "iovs"
    wait_for(lambda: len(os.listdir(links)) == 6 and len(_records()) >= 3)
    child.send_signal(signal.SIGKILL)
    child.wait()
    if daemon_cleans_up:
        emulator.sweep()
        assert os.listdir(links) == []
    other = subprocess.run(
        [sys.executable, "-c", _CRASHES, str(path)], env={**os.environ, **emulator.environment()}, check=False
    )
    assert other.returncode == 0
    assert os.listdir(links) == []
    emulator.sweep()


def _records() -> list[Path]:
    return list(Path("/dev/shm").glob("engine-loader-*.links"))


def test_what_an_older_version_left_is_removed(emulator: Emulator, path: Path, content: bytes) -> None:
    links = emulator.mount / "3fs-virt" / "iovs"
    buffer, ring, other = (uuid.uuid4() for _ in range(3))
    for name in (f"{buffer}", f"{ring}.r-1.t0.f10", f"{other}"):
        (links / name).symlink_to("/dev/shm/nothing")
    records = Path(f"/dev/shm/.engine-loader-3fs-{os.geteuid()}")
    records.mkdir(mode=0o700, exist_ok=True)
    (records / buffer.hex).write_text(f"{buffer.hex}{ring.hex}{emulator.mount}")
    try:
        assert remove_dead() == 2
        assert os.listdir(links) == [str(other)]
        assert not (records / buffer.hex).exists()
    finally:
        (links / str(other)).unlink()


def test_a_plan_asks_nothing_of_files_that_it_does_not_read(
    native_reader: MakeReader, emulator: Emulator, path: Path, content: bytes
) -> None:
    reader = native_reader()
    files = [reader.open(path) for _ in range(3)]
    files[0].close()
    files[2].close()
    target = np.zeros(1000, np.uint8)
    with closing(files[1]):
        plan = make_extents([(1, 1, 5, 1000, 0, target.ctypes.data, 0)])
        reader.readers.submit(files, plan, owner=target).wait()
    assert target.tobytes() == content[5:1005]
