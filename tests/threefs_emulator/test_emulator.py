"""The emulator is as strict as the real library: otherwise nothing that runs on it proves anything."""

import ctypes
import errno
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from engine_loader.sources.threefs.rings import _Cqe, _Ior, _Iov
from tests.support.threefs import Emulator
from tests.support.waiting import any_try

from .driving import A_MOMENT, KIB, SOON, ContentFile, buffer, opened, read, ring


def test_structs_have_the_published_layouts() -> None:
    assert (ctypes.sizeof(_Iov), ctypes.sizeof(_Ior), ctypes.sizeof(_Cqe)) == (312, 600, 24)
    assert (_Iov.size.offset, _Ior.for_read.offset, _Ior.flags.offset) == (288, 576, 592)


def test_the_library_has_the_real_name(emulator: Emulator) -> None:
    assert b"libhf3fs_api_shared.so\0" in emulator.library.read_bytes()


def test_files_below_the_mount_are_on_3fs_and_others_not(emulator: Emulator, file: ContentFile, tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    for path, expected in ((file[0], True), (tmp_path / "other", False)):
        fd = os.open(path, os.O_RDONLY)
        assert emulator.loaded.is_threefs(fd) is expected
        os.close(fd)
    assert emulator.loaded.mount_point(str(file[0])) == str(emulator.mount)
    assert emulator.loaded.mount_point(str(tmp_path)) is None


def test_a_descriptor_is_registered_once(emulator: Emulator, file: ContentFile, tmp_path: Path) -> None:
    with opened(emulator, file[0]) as fd:
        with pytest.raises(OSError, match="Invalid argument"):
            emulator.loaded.register(fd)
        assert emulator.count("registrations") == 1
    (tmp_path / "other").touch()
    fd = os.open(tmp_path / "other", os.O_RDONLY)
    with pytest.raises(OSError, match="Bad file descriptor"):
        emulator.loaded.register(fd)
    os.close(fd)


def test_bytes_arrive_and_a_short_result_is_the_end_of_the_file(emulator: Emulator, file: ContentFile) -> None:
    path, content = file
    assert read(emulator, path, 12345) == (64 * KIB, content[12345 : 12345 + 64 * KIB])
    assert read(emulator, path, len(content) - 10) == (10, content[-10:])
    assert read(emulator, path, len(content) + 10) == (0, b"")


def test_what_prep_refuses(emulator: Emulator, file: ContentFile) -> None:
    with opened(emulator, file[0]) as fd, buffer(emulator, 64 * KIB) as memory:
        one = ring(emulator)
        unregistered = os.open(file[0], os.O_RDONLY)
        for piece, for_read, number, expected in (
            (memory[:], True, unregistered, errno.EBADF),
            (memory[:0], True, fd, errno.EINVAL),
            (memory[:], False, fd, errno.EINVAL),
        ):
            with pytest.raises(OSError) as caught:
                one.prepare(piece, for_read, number, 0)
            assert caught.value.errno == expected
        outside = memory[:]
        outside.size += 1
        with pytest.raises(OSError, match="Invalid argument"):
            one.prepare(outside, True, fd, 0)
        os.close(unregistered)
        one.destroy()


def test_a_full_ring_says_eagain_until_something_is_reaped(emulator: Emulator, file: ContentFile) -> None:
    with opened(emulator, file[0]) as fd, buffer(emulator, 64 * KIB) as memory:
        one = ring(emulator, entries=2)
        for slot in range(2):
            one.prepare(memory[slot * KIB : (slot + 1) * KIB], True, fd, 0).submit()
        time.sleep(0.05)  # done, but not reaped
        with pytest.raises(OSError) as caught:
            one.prepare(memory[:KIB], True, fd, 0)
        assert caught.value.errno == errno.EAGAIN
        assert len(one.wait(max_results=1, min_results=1, timeout=SOON)) == 1
        one.prepare(memory[4 * KIB : 5 * KIB], True, fd, 0).submit()
        assert len(one.wait(min_results=2, timeout=SOON)) == 2
        one.destroy()


def test_a_time_out_is_no_error(emulator: Emulator) -> None:
    one = ring(emulator)
    began = time.monotonic()
    assert one.wait(min_results=1, timeout=A_MOMENT) == []
    assert time.monotonic() - began >= 0.08
    one.destroy()


def test_a_positive_io_depth_waits_for_a_whole_batch(emulator: Emulator, file: ContentFile) -> None:
    with opened(emulator, file[0]) as fd, buffer(emulator, 64 * KIB) as memory:
        one = ring(emulator, io_depth=4)
        pieces = [memory[number * KIB : (number + 1) * KIB] for number in range(4)]
        for piece in pieces[:3]:
            one.prepare(piece, True, fd, 0).submit()
        assert one.wait(min_results=1, timeout=A_MOMENT) == []
        one.prepare(pieces[3], True, fd, 0).submit()
        assert len(one.wait(min_results=4, timeout=SOON)) == 4
        one.destroy()


@pytest.mark.parametrize(("io_depth", "together"), [(0, 4), (2, 2), (-2, 2), (-1, 1)])
@any_try(5)
def test_a_batch_completes_with_its_slowest_io(
    emulator: Emulator, file: ContentFile, io_depth: int, together: int
) -> None:
    emulator.set("eager_every=0,late_ms=300")
    with opened(emulator, file[0]) as fd, buffer(emulator, 64 * KIB) as memory:
        one = ring(emulator, io_depth=io_depth)
        emulator.set(f"late_every={emulator.count('ios') + 4}")  # the fourth from here
        for number in range(4):
            one.prepare(memory[number * KIB : (number + 1) * KIB], True, fd, 0)
        first = one.submit().wait(min_results=4, timeout=A_MOMENT)
        rest = one.wait(min_results=4 - len(first), timeout=SOON)
        one.destroy()
        assert (len(first), len(rest)) == (4 - together, together)


def test_completions_come_out_of_order(emulator: Emulator, file: ContentFile) -> None:
    emulator.set("jitter_us=3000")
    with opened(emulator, file[0]) as fd, buffer(emulator, 64 * KIB) as memory:
        one = ring(emulator)
        for number in range(12):
            one.prepare(memory[number * KIB : (number + 1) * KIB], True, fd, number * KIB)
        done = one.submit().wait(min_results=12, timeout=SOON)
        order = [piece.base_off for piece in done]
        assert sorted(order) == [number * KIB for number in range(12)] != order
        one.destroy()


def test_an_io_must_not_cross_a_block(emulator: Emulator, file: ContentFile) -> None:
    with opened(emulator, file[0]) as fd, buffer(emulator, 64 * KIB, block_size=32 * KIB) as memory:
        one = ring(emulator)
        for piece, expected in ((memory[: 32 * KIB], 32 * KIB), (memory[16 * KIB : 40 * KIB], -errno.EINVAL)):
            (done,) = one.prepare(piece, True, fd, 0).submit().wait(min_results=1, timeout=SOON)
            assert done.result == expected
        one.destroy()


def test_a_buffer_without_a_link_is_not_found(emulator: Emulator, file: ContentFile) -> None:
    with opened(emulator, file[0]) as fd, buffer(emulator, 4 * KIB, linked=False) as memory:
        one = ring(emulator)
        (done,) = one.prepare(memory[:], True, fd, 0).submit().wait(min_results=1, timeout=SOON)
        assert done.result == -errno.EINVAL
        one.destroy()


@pytest.mark.parametrize(
    ("options", "check"),
    [
        ("error=5,error_every=1", lambda result: result == -errno.EIO),
        ("short_every=1", lambda result: 0 <= result < 64 * KIB),
        ("zero_every=1", lambda result: result == 0),
        ("hole_at=1000,hole_bytes=9999999", lambda result: result == 1000),
        ("buffer_every=1", lambda result: result == -errno.EACCES),
    ],
)
def test_faults_on_demand(emulator: Emulator, file: ContentFile, options: str, check: Callable[[int], bool]) -> None:
    emulator.set(options)
    result, content = read(emulator, file[0])
    assert check(result)
    assert content == file[1][: max(0, result)]


@pytest.mark.parametrize("options", ["hang_every=1", "die_after=0,dead=1"])
def test_ios_that_never_complete(emulator: Emulator, file: ContentFile, options: str) -> None:
    with opened(emulator, file[0]) as fd, buffer(emulator, 4 * KIB) as memory:
        one = ring(emulator)
        emulator.set(options)
        assert one.prepare(memory[:], True, fd, 0).submit().wait(min_results=1, timeout=A_MOMENT) == []
        one.destroy()
        emulator.set("reset")


def test_the_link_has_its_bandwidth(emulator: Emulator, file: ContentFile) -> None:
    emulator.set("bandwidth=1000000000,latency_us=1000")
    with opened(emulator, file[0]) as fd, buffer(emulator, 16 << 20) as memory:
        one = ring(emulator, entries=32)
        began = time.monotonic()
        for _ in range(4):
            for number in range(16):
                one.prepare(memory[number << 20 : (number + 1) << 20], True, fd, 0).submit()
            assert len(one.wait(min_results=16, timeout=SOON)) == 16
        assert time.monotonic() - began > 0.067
        one.destroy()


def test_rules_that_the_real_library_does_not_check_are_counted(emulator: Emulator, file: ContentFile) -> None:
    """In a process of its own: a broken rule fails the test that breaks it."""
    script = """
import sys
from pathlib import Path
from tests.threefs_emulator.driving import buffer, opened, ring, SOON
from tests.support.threefs import emulator
one = emulator()
path = one.mount / "file"
path.write_bytes(bytes(8192))
with opened(one, path) as fd, buffer(one, 8192) as memory:
    both = ring(one, io_depth=0)
    one.set("eager_every=0")
    both.prepare(memory[:], True, fd, 0).prepare(memory[4096:], True, fd, 0).submit().wait(min_results=2, timeout=SOON)
    both.destroy()
sys.exit(0 if one.count("violations") == 1 else 1)
"""
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "same memory" in done.stderr


def test_an_unknown_option_is_refused(emulator: Emulator) -> None:
    with pytest.raises(AssertionError):
        emulator.set("latency=3")


def test_the_control_file_is_read_again_when_it_changes(emulator: Emulator, file: ContentFile, tmp_path: Path) -> None:
    script = """
import os, sys
from pathlib import Path
from tests.threefs_emulator.driving import read
from tests.support.threefs import emulator
control = Path(os.environ["HF3FS_EMULATOR_CONTROL"])
one = emulator()
path = one.mount / "file"
path.write_bytes(bytes(1 << 20))
results = []
for text in ("", "error=5,error_every=1", "error=103,error_every=1", ""):
    control.write_text(text)
    results.append(read(one, path, 0, 4096)[0])
sys.exit(0 if results == [4096, -5, -103, 4096] else f"{results}")
"""
    environment = {**os.environ, "HF3FS_EMULATOR_CONTROL": str(tmp_path / "control")}
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
