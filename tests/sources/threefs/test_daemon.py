"""A daemon that hangs, loses data, or outlives its clients: errors in time, no zeros, and nothing left registered."""

import os
import signal
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from engine_loader.errors import TransferError
from engine_loader.sources.threefs.links import remove_dead
from engine_loader.sources.threefs.threefs_source import ThreeFsFile, ThreeFsOptions, ThreeFsSource
from tests.support.threefs import Emulator
from tests.support.waiting import wait_for

from .conftest import MIB, SMALL

pytestmark = pytest.mark.usefixtures("way")


@pytest.fixture(params=["library", "binding"])
def way(request: pytest.FixtureRequest, emulator: Emulator) -> str:
    """By which the Python channel reaches 3FS."""
    if request.param == "binding":
        request.getfixturevalue("only_binding")
    return str(request.param)


def opened(path: Path, options: ThreeFsOptions = SMALL) -> ThreeFsFile:
    file = ThreeFsSource(options).open(str(path))
    assert isinstance(file, ThreeFsFile)
    return file


def read_all(file: ThreeFsFile) -> bytes:
    target = memoryview(bytearray(file.size))
    done = 0
    while done < file.size:
        n = file.read_into(done, [target[done : done + MIB]])
        assert n > 0
        done += n
    return bytes(target)


@pytest.mark.parametrize("hole", ["hole_at=1000000,hole_bytes=65536", "hole_at=0,hole_bytes=99999999"])
def test_a_hole_that_the_mount_knows_nothing_of_is_read_through_the_mount(
    emulator: Emulator, path: Path, content: bytes, hole: str
) -> None:
    emulator.set(hole)
    with closing(opened(path)) as file:
        assert read_all(file) == content


def test_data_that_is_lost_is_an_error_and_no_zeros(emulator: Emulator, path: Path, content: bytes) -> None:
    """The mount reads zeros where a chunk is missing."""
    with path.open("r+b") as writing:
        writing.seek(2 * MIB)
        writing.write(bytes(MIB))
    emulator.set(f"hole_at={2 * MIB},hole_bytes={MIB}")
    with (
        closing(opened(path)) as file,
        pytest.raises(TransferError, match=f"byte {2 * MIB}.*3FS has no data") as caught,
    ):
        read_all(file)
    assert (caught.value.file, caught.value.offset) == (str(path), 2 * MIB)


def test_zeros_that_are_there_are_read(emulator: Emulator, path: Path) -> None:
    path.write_bytes(bytes(5 * MIB))
    emulator.set("zero_every=3")
    with closing(opened(path)) as file:
        assert read_all(file) == bytes(5 * MIB)


@pytest.mark.parametrize("option", ["ior_error=5", "semaphore_error=5"])
def test_a_ring_that_is_refused_leaves_nothing(emulator: Emulator, path: Path, option: str, way: str) -> None:
    emulator.set(option)
    with closing(opened(path)) as file, pytest.raises(TransferError, match="made no ring: Input/output error"):
        read_all(file)
    emulator.set("reset")


def test_newer_daemons_are_read_from(emulator: Emulator, path: Path, content: bytes) -> None:
    emulator.set("no_negative_depth=1")
    with closing(opened(path)) as file:
        assert read_all(file) == content


@pytest.mark.parametrize("fault", ["mount_hang=1", "ioctl_hang=1"])
def test_a_daemon_that_does_not_answer_ends_a_load_in_time(emulator: Emulator, path: Path, fault: str) -> None:
    options = replace(SMALL, deadline_s=0.3)
    file = opened(path, options)
    emulator.set(fault)
    with pytest.raises(TransferError, match=r"3FS did not answer for 0\.3 s.*its daemon hangs") as caught:
        if fault.startswith("ioctl"):
            opened(path, options)
        else:
            read_all(file)
    assert caught.value.file == str(path)
    file.close()
    emulator.set("reset")  # the daemon is back: what was left to threads is given back, though ``caught`` knows of it
    wait_for(lambda: emulator.count("registrations") == 0)


def test_a_channel_with_ios_in_flight_is_not_used_again(emulator: Emulator, path: Path, content: bytes) -> None:
    """The second IO cannot be prepared while the first is on its way."""
    with closing(opened(path)) as file:
        prepare = file._pool._arguments[0]
        assert read_all(file) == content
        (channel,) = file._pool._idle
        ring, calls = channel._ring, []

        class Refusing:
            def __getattr__(self, name: str) -> object:
                return getattr(ring, name)

            def prepare(self, *args: object) -> object:
                calls.append(args)
                if len(calls) == 2:
                    raise OSError(9, "Bad file descriptor")
                return ring.prepare(*args)

        channel._ring = Refusing()
        with pytest.raises(OSError, match="Bad file descriptor"):
            file.read_into(0, [memoryview(bytearray(MIB))])
        assert file._pool._idle == []
        assert read_all(file) == content
        assert prepare is file._pool._arguments[0]


_CRASHES = """
import os, sys
from pathlib import Path
from tests.sources.threefs.test_daemon import opened, read_all
file = opened(Path(sys.argv[1]))
read_all(file)
os.write(1, b"read\\n")
sys.stdin.read()
"""


def crash(emulator: Emulator, path: Path, *, whole_mount: bool) -> None:
    """A process that has read is killed while it has a ring."""
    environment = {**os.environ, **emulator.environment(whole_mount=whole_mount)}
    command = [sys.executable, "-c", _CRASHES, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "read\n"
            assert len(emulator.links()) == 2
            assert remove_dead() == 0, "it lives"
        finally:
            child.send_signal(signal.SIGKILL)


def test_the_daemon_forgets_a_client_that_was_killed(emulator: Emulator, path: Path) -> None:
    crash(emulator, path, whole_mount=True)
    assert len(emulator.links()) == 2
    emulator.sweep()
    assert emulator.links() == []
    assert remove_dead() == 1  # the shared memory has a name yet


def test_the_next_start_removes_what_a_client_that_was_killed_left(
    emulator: Emulator, path: Path, content: bytes
) -> None:
    crash(emulator, path, whole_mount=False)
    assert len(emulator.links()) == 2
    with closing(opened(path)) as file:
        assert emulator.links() == []
        assert read_all(file) == content


def test_the_thread_of_a_ring_holds_the_directory_of_links(emulator: Emulator, path: Path) -> None:
    directory = os.fspath(emulator.mount / "3fs-virt" / "iovs")
    with closing(opened(path)) as file:
        before = {fd for fd in os.listdir("/proc/self/fd") if os.path.realpath(f"/proc/self/fd/{fd}") == directory}
        read_all(file)
        (channel,) = file._pool._idle
        assert str(channel._directory) not in before
        assert not os.get_inheritable(channel._directory)
        assert os.readlink(f"/proc/self/fd/{channel._directory}") == directory
    wait_for(lambda: channel._directory == -1)
