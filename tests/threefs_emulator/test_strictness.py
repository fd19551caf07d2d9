"""Where the real library and daemon hurt in production, the emulator hurts as well."""

import ctypes
import errno
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from engine_loader.sources.threefs.rings import Ioring, _Ior
from tests.support.threefs import OF_THE_LIBRARY, Emulator
from tests.support.waiting import any_try, wait_for

from .driving import A_MOMENT, KIB, SOON, ContentFile, buffer, opened, read, ring

FORBID_READ_HOLES = 2


def test_a_hole_inside_an_io_comes_back_as_zeros(emulator: Emulator, file: ContentFile) -> None:
    path, content = file
    emulator.set("hole_at=1000,hole_bytes=50")
    result, got = read(emulator, path)
    assert result == 64 * KIB
    assert got == content[:1000] + bytes(50) + content[1050 : 64 * KIB]
    result, got = read(emulator, path, 1020, 100)
    assert (result, got) == (100, bytes(30) + content[1050:1120])


def test_a_ring_that_forbids_holes_gets_enodata(emulator: Emulator, file: ContentFile) -> None:
    emulator.set("hole_at=1000,hole_bytes=50")
    results = []
    for offset, nbytes in ((0, 4096), (1020, 100), (500, 520), (1010, 10), (2000, 100)):
        with opened(emulator, file[0]) as fd, buffer(emulator, nbytes) as memory:
            one = ring(emulator, flags=FORBID_READ_HOLES)
            (done,) = one.prepare(memory[:], True, fd, offset).submit().wait(min_results=1, timeout=SOON)
            results.append(done.result)
            (link,) = (name for name in emulator.links() if ".r" in name)
            os.unlink(emulator.mount / "3fs-virt" / "iovs" / link)
            one.destroy()
    assert results == [-errno.ENODATA, -errno.ENODATA, 500, 0, 100], "one that ends in a hole is only short"


@pytest.mark.parametrize(
    ("depth", "flags", "name", "stays"), [(-1, 0, ".r-1.t0", 0), (4, 1, ".r4.t0.f1", 0), (-2, 2, ".r-2.t0.f10", 1)]
)
def test_a_ring_with_flags_stays_registered_when_it_is_destroyed(
    emulator: Emulator, depth: int, flags: int, name: str, stays: int
) -> None:
    one = ring(emulator, io_depth=depth, flags=flags)
    (link,) = emulator.links()
    assert link[36:] == name
    one.destroy()
    assert emulator.links() == [link] * stays
    (emulator.mount / "3fs-virt" / "iovs" / link).unlink(missing_ok=True)


def test_a_ring_without_its_link_is_not_looked_at(emulator: Emulator, file: ContentFile) -> None:
    with opened(emulator, file[0]) as fd, buffer(emulator, 4 * KIB) as memory:
        one = ring(emulator)
        (link,) = (name for name in emulator.links() if ".r" in name)
        os.unlink(emulator.mount / "3fs-virt" / "iovs" / link)
        emulator.set("eager_every=0")
        assert one.prepare(memory[:], True, fd, 0).submit().wait(min_results=1, timeout=A_MOMENT) == []
        one.destroy()


def test_a_ring_that_fails_late_leaves_its_link(emulator: Emulator) -> None:
    emulator.set(f"semaphore_error={errno.EIO}")
    mount, native = str(emulator.mount).encode(), ctypes.byref(_Ior())
    assert emulator.loaded.calls.hf3fs_iorcreate4(native, mount, 4, True, 1, 0, -1, 0) == -errno.EIO
    (link,) = emulator.links()
    (emulator.mount / "3fs-virt" / "iovs" / link).unlink()


def test_newer_daemons_refuse_a_negative_depth(emulator: Emulator) -> None:
    emulator.set("no_negative_depth=1")
    with pytest.raises(OSError, match="Invalid argument"):
        ring(emulator, io_depth=-1)
    ring(emulator, io_depth=1).destroy()


@any_try(5)
def test_slots_are_freed_in_order(emulator: Emulator, file: ContentFile) -> None:
    """Behind an IO that does not come, each of the others takes its place for good."""
    entries = 8
    with opened(emulator, file[0]) as fd, buffer(emulator, 64 * KIB) as memory:
        one = ring(emulator, entries=entries)
        emulator.set(f"eager_every=0,hang_every={emulator.count('ios') + 1}")
        one.prepare(memory[:KIB], True, fd, 0).submit()
        wait_for(lambda: emulator.count("in_flight") == 1)
        emulator.set("hang_every=0")
        for number in range(1, entries):
            one.prepare(memory[number * KIB : (number + 1) * KIB], True, fd, 0).submit()
        assert len(one.wait(max_results=entries, min_results=entries - 1, timeout=SOON)) == entries - 1
        with pytest.raises(OSError) as caught:
            one.prepare(memory[:KIB], True, fd, 0)
        assert caught.value.errno == errno.EAGAIN
        one.destroy()


@pytest.mark.parametrize("call", ["symlink", "unlink"])
def test_a_mount_that_hangs_answers_when_the_daemon_is_back(emulator: Emulator, call: str) -> None:
    made: list[Ioring] = []
    if call == "unlink":
        made.append(ring(emulator))
    emulator.set("mount_hang=1")
    thread = threading.Thread(target=made[0].destroy if made else lambda: made.append(ring(emulator)))
    thread.start()
    wait_for(lambda: emulator.count("blocked") == 1)
    thread.join(0.05)
    assert thread.is_alive()
    emulator.set("mount_hang=0")
    thread.join()
    made[0].destroy()


def test_an_ioctl_that_hangs(emulator: Emulator, file: ContentFile) -> None:
    answers: list[bool] = []
    with file[0].open("rb") as opened_file:
        emulator.set("ioctl_hang=1")
        thread = threading.Thread(target=lambda: answers.append(emulator.loaded.is_threefs(opened_file.fileno())))
        thread.start()
        wait_for(lambda: emulator.count("blocked") == 1)
        assert answers == []
        emulator.set("ioctl_hang=0")
        thread.join()
    assert answers == [True]


_CLIENT = """
import os, sys, threading, time
from pathlib import Path
from engine_loader.sources.threefs.shared_library import load_library
from engine_loader.sources.threefs.rings import Ioring
mount = os.environ["HF3FS_EMULATOR_MOUNT"]
library = load_library(Path(os.environ["HF3FS_LIB_DIR"]) / "libhf3fs_api_shared.so")
kept = []
def client():
    if "own-handle" in sys.argv:
        handle = os.open(f"{mount}/3fs-virt/iovs", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    kept.append(Ioring(library, mount, 4, True, 1))
    if "close" in sys.argv:
        os.close(handle)
    os.write(1, b"made\\n")
    time.sleep(1000)
for _ in range(2):
    threading.Thread(target=client, daemon=True).start()
time.sleep(1000)
"""


@contextmanager
def _client(emulator: Emulator, options: str, *words: str) -> Iterator[subprocess.Popen[str]]:
    """A process with two threads that each made a ring; it is killed at the end."""
    environment = {**os.environ, **emulator.environment(options, whole_mount=True)}
    command = [sys.executable, "-c", _CLIENT, *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as child:
        try:
            assert child.stdout is not None
            assert [child.stdout.readline() for _ in range(2)] == ["made\n"] * 2
            yield child
        finally:
            child.send_signal(signal.SIGKILL)


@pytest.mark.parametrize(("words", "left"), [((), 1), (("own-handle",), 0)])
def test_after_a_crash_the_daemon_forgets_what_the_threads_with_a_handle_made(
    emulator: Emulator, words: tuple[str, ...], left: int
) -> None:
    with _client(emulator, "", *words):
        assert len(emulator.links()) == 2
    assert len(emulator.links()) == 2
    emulator.sweep()
    links = emulator.links()
    for link in links:
        (emulator.mount / "3fs-virt" / "iovs" / link).unlink()
    assert len(links) == left, "the library holds the directory by the first ring's thread only"


_MAKES_MEMORY = """
import ctypes, os
from pathlib import Path
from engine_loader.sources.threefs.shared_library import load_library
library = load_library(Path(os.environ["HF3FS_LIB_DIR"]) / "libhf3fs_api_shared.so")
os.write(1, b"makes it\\n")
iov = ctypes.create_string_buffer(312)
size = ctypes.c_size_t(4096)
library.calls.hf3fs_iovcreate(iov, os.environ["HF3FS_EMULATOR_MOUNT"].encode(), size, ctypes.c_size_t(0), -1)
"""


def test_memory_that_a_killed_process_had_not_linked_yet_is_there_until_a_sweep(emulator: Emulator) -> None:
    environment = {**os.environ, **emulator.environment("mount_hang=1")}
    command = [sys.executable, "-c", _MAKES_MEMORY]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "makes it\n"
            records = emulator.mount / "3fs-virt" / ".daemon"
            wait_for(lambda: list(records.glob(f"memory.{child.pid}.*")))
            (record,) = records.glob(f"memory.{child.pid}.*")
            memory = Path("/dev/shm") / record.name.partition(f"{child.pid}.")[2]
            wait_for(memory.exists)
            emulator.sweep()
            assert memory.exists(), "its process lives"
        finally:
            child.send_signal(signal.SIGKILL)
    assert (memory.exists(), memory.name.startswith(OF_THE_LIBRARY), emulator.links()) == (True, True, [])
    emulator.sweep()
    assert not memory.exists()


def test_a_daemon_in_another_pid_namespace_forgets_everybody(emulator: Emulator) -> None:
    with _client(emulator, "other_pid_namespace=1", "own-handle"):
        assert len(emulator.links()) == 2
        with _client(emulator, "other_pid_namespace=1", "own-handle", "close"):
            wait_for(lambda: emulator.links() == [])  # the second client closed its handles
    emulator.sweep()


def test_the_table_of_descriptors_has_the_size_of_the_hard_limit(emulator: Emulator) -> None:
    """8 bytes each, written to as the library is loaded, before any file is registered."""
    script = """
import ctypes, resource, sys
from pathlib import Path
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
before = resident()
ctypes.CDLL(sys.argv[1])
print(resident() - before)
"""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    grown = []
    for limit in (min(hard, 1024), hard):
        done = subprocess.run(
            [sys.executable, "-c", script, str(emulator.library)],
            preexec_fn=lambda limit=limit: resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit)),
            check=True,
            capture_output=True,
            text=True,
        )
        grown.append(int(done.stdout))
    assert grown[1] - grown[0] > (hard - 1024) * 8 * 0.9


def test_the_daemon_carries_out_so_many_batches(emulator: Emulator, file: ContentFile) -> None:
    emulator.set("batches=3,latency_us=2000,eager_every=0")
    with opened(emulator, file[0]) as fd, buffer(emulator, 64 * KIB) as memory:
        rings = [ring(emulator, io_depth=depth) for depth in (1, 4)]
        for one in rings:
            for number in range(8):
                one.prepare(memory[number * KIB : (number + 1) * KIB], True, fd, 0)
            one.submit()
        for one in rings:
            assert len(one.wait(min_results=8, timeout=SOON)) == 8
            one.destroy()
    assert emulator.count("max_batches") == 3
    assert emulator.count("running_batches") == 0


def test_requests_have_their_size_and_their_number(emulator: Emulator, file: ContentFile) -> None:
    """4 servers, chunks of 4 KiB: an IO of 64 KiB is 16 pieces, four a server, two of them in a request."""
    emulator.set(
        "requests=3,server_requests=1,servers=4,chunk_bytes=4096,request_bytes=8192,latency_us=500,eager_every=0"
    )
    before = emulator.count("requests")
    result, content = read(emulator, file[0])
    assert (result, content) == (64 * KIB, file[1][: 64 * KIB])
    assert emulator.count("requests") - before == 8
    assert emulator.count("max_requests") == 3


def test_a_batch_sends_a_server_its_pieces_together(emulator: Emulator, file: ContentFile) -> None:
    """16 IOs of a chunk: one by one they are 16 requests, in a batch one of 4 MiB to each of the 4 servers."""
    counts = []
    with opened(emulator, file[0]) as fd, buffer(emulator, 64 * KIB) as memory:
        for depth in (1, 0):
            emulator.set("limits=1,servers=4,chunk_bytes=4096,eager_every=0")
            before = emulator.count("requests")
            one = ring(emulator, io_depth=depth)
            for number in range(16):
                one.prepare(memory[4 * number * KIB : 4 * (number + 1) * KIB], True, fd, 4 * number * KIB)
            assert len(one.submit().wait(min_results=16, timeout=SOON)) == 16
            one.destroy()
            counts.append(emulator.count("requests") - before)
    assert counts == [16, 4]


def test_limits_set_what_3fs_ships(emulator: Emulator, file: ContentFile) -> None:
    """32 requests at once, 2 ms each: 256 IOs of a chunk take eight rounds."""
    emulator.set("limits=1,chunk_bytes=4096,latency_us=2000,eager_every=0")
    with opened(emulator, file[0]) as fd, buffer(emulator, 1024 * KIB) as memory:
        one = ring(emulator, entries=256, io_depth=1)
        began = time.monotonic()
        for number in range(256):
            one.prepare(memory[4 * number * KIB : 4 * (number + 1) * KIB], True, fd, 4 * number * KIB)
        assert len(one.submit().wait(min_results=256, timeout=SOON)) == 256
        assert time.monotonic() - began >= 8 * 0.002
        one.destroy()
    assert emulator.count("max_requests") == 32
    assert emulator.count("max_batches") == 112


def test_processes_share_the_link(emulator: Emulator, tmp_path: Path) -> None:
    """Two processes on one link of 100 MB/s: what one has on the way, the other waits for."""
    script = """
import os, sys
from pathlib import Path
from tests.threefs_emulator.driving import read
from tests.support.threefs import OF_THE_LIBRARY, Emulator
one = Emulator(Path(os.environ["HF3FS_LIB_DIR"]) / "libhf3fs_api_shared.so", Path(os.environ["HF3FS_EMULATOR_MOUNT"]))
one.set("bandwidth=100000000,shared_link=1")
read(one, one.mount / "file", 0, 1 << 20)
print("taken", flush=True)
"""
    path = emulator.mount / "file"
    path.write_bytes(bytes(1 << 20))
    emulator.set("bandwidth=100000000,shared_link=1")
    environment = {**os.environ, **emulator.environment()}
    before = time.monotonic_ns()
    read(emulator, path, 0, 1 << 20)
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True, env=environment)
    assert done.stdout == "taken\n", done.stderr
    link = emulator.mount / "3fs-virt" / ".daemon" / ".link"
    free_ns = int.from_bytes(link.read_bytes(), sys.byteorder)
    assert free_ns - before >= 2 * (1 << 20) * 10
