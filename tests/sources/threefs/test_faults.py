"""Whatever 3FS does: the right bytes or one clear error, within the deadline, and nothing left open."""

import errno
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine_loader.errors import TransferCancelled, TransferError
from engine_loader.sources.threefs.threefs_source import ThreeFsOptions
from engine_loader.transfer.plan import make_extents
from tests.support.threefs import Emulator
from tests.support.waiting import GENEROUS_S, any_try, wait_for

from .conftest import KIB, MIB, SMALL, MakeReader

PASSING = [errno.EREMOTEIO, errno.EIO, errno.EINTR]


@pytest.mark.parametrize(
    "options",
    [
        *(f"error_every=3,error={code}" for code in PASSING),
        "short_every=2",
        "zero_every=4",
        "hole_at=700000,hole_bytes=900000",
        "hole_at=0,hole_bytes=99999999",
        "full_every=3",
        "late_every=5,late_ms=150",
        "jitter_us=3000",
        "short_every=3,error_every=5,zero_every=7,full_every=4,jitter_us=500,late_every=40,late_ms=60",
    ],
)
def test_what_passes_costs_no_byte(
    make_reader: MakeReader, emulator: Emulator, path: Path, content: bytes, options: str
) -> None:
    emulator.set(options)
    reader = make_reader(replace(SMALL, io_bytes=256 * KIB), max_tries=8)
    assert reader.read(path) == [content]


def test_retries_and_short_reads_are_counted(native_reader: MakeReader, emulator: Emulator, path: Path) -> None:
    emulator.set("error_every=4,short_every=3")
    reader = native_reader()
    reader.read(path)
    statistics = reader.readers.statistics()
    assert statistics.retries > 0
    assert statistics.short_reads > 0


def test_holes_are_read_through_the_mount_and_counted_as_such(
    native_reader: MakeReader, emulator: Emulator, path: Path, content: bytes
) -> None:
    emulator.set("hole_at=1000000,hole_bytes=1000000")
    reader = native_reader()
    assert reader.read(path) == [content]
    modes = reader.readers.statistics().modes
    assert modes["buffered"] >= 1_000_000
    assert sum(modes.values()) == len(content)


@pytest.mark.parametrize(("code", "tries"), [(errno.EREMOTEIO, 3), (errno.EPERM, 1), (errno.EACCES, 1)])
def test_what_does_not_pass_is_one_clear_error(
    make_reader: MakeReader, emulator: Emulator, path: Path, code: int, tries: int
) -> None:
    emulator.set(f"error_every=1,error={code}")
    reader = make_reader(max_tries=3)
    with pytest.raises(TransferError) as caught:
        reader.read(path)
    error = caught.value
    assert (error.file, error.errno) == (str(path), code)
    assert error.offset is not None
    assert errno.errorcode[code] in str(error)
    assert ("after 3 tries" in str(error)) == (tries > 1)


def test_a_buffer_that_3fs_cannot_register_is_told(make_reader: MakeReader, emulator: Emulator, path: Path) -> None:
    emulator.set("buffer_every=1")
    with pytest.raises(TransferError, match=r"EACCES.*3FS could not register the buffer in /dev/shm") as caught:
        make_reader().read(path)
    assert caught.value.errno == errno.EACCES


@pytest.mark.parametrize(("options", "what"), [("iov_error=28", "buffer"), ("ior_error=2", "ring")])
def test_rings_that_cannot_be_made_are_told(
    native_reader: MakeReader, emulator: Emulator, path: Path, options: str, what: str
) -> None:
    emulator.set(options)
    reader = native_reader()
    with pytest.raises(TransferError, match=f"model.bin: 3FS at {emulator.mount} made no {what}"):
        reader.read(path)
    emulator.set("reset")
    reader.read(path)


def test_a_dev_shm_that_is_too_small_is_told(make_reader: MakeReader, path: Path) -> None:
    reader = make_reader(ThreeFsOptions(rings=1, depth=1024, io_bytes=256 * MIB))
    with pytest.raises(TransferError, match="/dev/shm") as caught:
        reader.read(path)
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.parametrize("options", ["hang_every=3", "dead=1", "die_after=4"])
def test_a_read_that_never_comes_back_ends_at_its_deadline(
    make_reader: MakeReader, emulator: Emulator, path: Path, options: str
) -> None:
    reader = make_reader(replace(SMALL, deadline_s=0.4, io_bytes=256 * KIB))
    file = reader.open(path)  # a dead daemon would not even say that this is 3FS
    target = np.zeros(file.size, np.uint8)
    emulator.set(options if "after" not in options else f"die_after={emulator.count('ios') + 4}")
    plan = make_extents([(0, 1, 0, file.size, 0, target.ctypes.data, 0)])
    transfer = reader.readers.submit([file], plan, owner=target)
    # While nothing can be made, a dead daemon's rings cannot either.
    with pytest.raises(TransferError, match=r"no byte came for 0\.4 s|made no ring|No such file") as caught:
        transfer.wait()
    assert caught.value.file == str(path)
    emulator.set("reset")
    file.close()


@any_try(3)
def test_after_giving_up_no_late_read_lands_and_the_next_one_works(
    make_reader: MakeReader, emulator: Emulator, path: Path, content: bytes
) -> None:
    emulator.set("reset")
    reader = make_reader(replace(SMALL, deadline_s=0.4, io_bytes=256 * KIB))
    rings = emulator.count("rings_made")
    with closing(reader.open(path)) as file:
        target = np.zeros(file.size, np.uint8)
        plan = make_extents([(0, 1, 0, file.size, 0, target.ctypes.data, 0)])
        emulator.set("late_every=2,late_ms=1500")
        with pytest.raises(TransferError, match="no byte came"):
            reader.readers.submit([file], plan, owner=target).wait()
    emulator.set("late_every=0")
    target[:] = 0xAA
    assert reader.read(path) == [content]
    wait_for(lambda: emulator.count("in_flight") == 0)
    assert (target == 0xAA).all()
    assert emulator.count("rings_made") > rings + 1


@any_try(5)
def test_other_transfers_survive_the_end_of_a_ring(
    native_reader: MakeReader, emulator: Emulator, path: Path, content: bytes
) -> None:
    """One ring, an IO of the first transfer hangs; the second one is read anew on another ring."""
    emulator.set("reset")
    reader = native_reader(ThreeFsOptions(rings=1, depth=16, io_bytes=512 * KIB, deadline_s=0.3))
    places = [np.zeros(1 * MIB, np.uint8) for _ in range(2)]
    with closing(reader.open(path)) as file:
        emulator.set(f"latency_us=20000,hang_every={emulator.count('ios') + 1}")
        first, second = (
            reader.readers.submit([file], make_extents([(0, 1, 0, 1 * MIB, 0, place.ctypes.data, 0)]), owner=place)
            for place in places
        )
        with pytest.raises(TransferError, match="no byte came"):
            first.wait()
        emulator.set("reset")
        second.wait()
    assert places[1].tobytes() == content[: 1 * MIB]


def test_cancelling_waits_for_no_io_and_no_deadline(native_reader: MakeReader, emulator: Emulator, path: Path) -> None:
    reader = native_reader(replace(SMALL, deadline_s=3600))
    file = reader.open(path)
    target = np.zeros(file.size, np.uint8)
    emulator.set("hang_every=1")
    transfer = reader.readers.submit([file], make_extents([(0, 1, 0, file.size, 0, target.ctypes.data, 0)]))
    assert not transfer.wait(timeout_s=0.1)
    transfer.cancel()
    with pytest.raises(TransferCancelled):
        transfer.wait()
    reader.readers.close()
    file.close()


_INTERRUPTED = """
import sys
from pathlib import Path
from tests.sources.threefs.conftest import Reader, ThreeFsSource, ThreeFsOptions, NativeReaders
reader = Reader(ThreeFsSource(ThreeFsOptions(rings=2, io_bytes=1 << 18, deadline_s=3600)), NativeReaders(2))
try:
    print("reading", flush=True)
    reader.read(Path(sys.argv[1]))
except KeyboardInterrupt:
    reader.readers.close()
    sys.exit(77)
"""


def test_ctrl_c_waits_for_no_io_and_no_deadline(emulator: Emulator, path: Path) -> None:
    environment = {**os.environ, **emulator.environment("hang_every=2")}
    command = [sys.executable, "-c", _INTERRUPTED, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "reading\n"
        time.sleep(0.3)
        child.send_signal(signal.SIGINT)
        assert child.wait(GENEROUS_S) == 77


def random_faults(rng: random.Random, *, hanging_mount: bool) -> str:
    """Some faults; each lets an IO pass in the end, or not. The places of a ring's queue are always freed in order."""
    faults = [
        f"error_every={rng.choice([1, 2, 3, 7, 20])},error={rng.choice([*PASSING, errno.EPERM])}",
        f"short_every={rng.choice([2, 3, 10])}",
        f"zero_every={rng.choice([2, 5, 30])}",
        f"hole_at={rng.randrange(1 << 20)},hole_bytes={rng.randrange(1 << 19)}",
        f"full_every={rng.choice([2, 3, 10])}",
        f"hang_every={rng.choice([30, 100])}",
        f"late_every={rng.choice([10, 50])},late_ms={rng.choice([20, 250])}",
        f"buffer_every={rng.choice([1, 2, 5])}",
        f"jitter_us={rng.choice([100, 2000])}",
        f"die_after={rng.randrange(1, 50)}",
        f"limits=1,chunk_bytes={rng.choice([4096, 65536])},latency_us={rng.choice([0, 50, 300, 500])}",
        f"batches={rng.choice([1, 4])}",
        *(["mount_hang=1"] if hanging_mount else []),
    ]
    return ",".join(["reset", *rng.sample(faults, rng.choice([0, 1, 1, 2, 2, 3, 4])), f"seed={rng.randrange(1, 1000)}"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", [("native", 1000), ("python", 150)], ids=["native", "python"])
def test_random_rounds_give_the_right_bytes_or_one_error(emulator: Emulator, kind: tuple[str, int]) -> None:
    from engine_loader.sources.threefs.threefs_source import ThreeFsSource
    from engine_loader.transfer.native.native_readers import NativeReaders
    from engine_loader.transfer.python.python_readers import PythonReaders

    from .conftest import Reader

    name, rounds = kind
    rng = random.Random(20)
    content = np.random.default_rng(5).bytes(1 * MIB + 777)
    path = emulator.mount / "random.bin"
    path.write_bytes(content)
    outcomes = {"right": 0, "error": 0}
    for number in range(rounds):
        emulator.set("reset")
        options = ThreeFsOptions(rng.choice([1, 2, 3]), rng.choice([1, 3, 16]), rng.choice([32, 64, 256]) * KIB, 0.15)
        settings = {"retry_delay_s": 0.001, "max_tries": 3}
        readers = (
            NativeReaders(2, **settings) if name == "native" else PythonReaders(2, block_bytes=512 * KIB, **settings)
        )
        reader = Reader(ThreeFsSource(options), readers)
        file = reader.open(path)
        faults = random_faults(rng, hanging_mount=name == "native")
        if "die_after" in faults:  # from here on
            dies = int(faults.partition("die_after=")[2].partition(",")[0])
            faults = faults.replace(f"die_after={dies}", f"die_after={emulator.count('ios') + dies}")
        emulator.set(faults)
        pieces = [(0, len(content))]
        if rng.random() < 0.5:
            cuts = sorted(rng.sample(range(len(content)), 40))
            pieces = [(a, b - a) for a, b in zip(cuts[::2], cuts[1::2], strict=True)]
        places = [np.zeros(length, np.uint8) for _, length in pieces]
        rows = [(0, 1, at, size, 0, to.ctypes.data, 0) for (at, size), to in zip(pieces, places, strict=True)]
        transfer = readers.submit([file], make_extents(rows), owner=places)
        if rng.random() < 0.1:
            transfer.cancel()
        try:
            transfer.wait()
            outcomes["right"] += 1
            for (at, size), place in zip(pieces, places, strict=True):
                assert place.tobytes() == content[at : at + size], (number, faults)
        except TransferCancelled:
            pass
        except TransferError as error:
            outcomes["error"] += 1
            assert error.file == str(path), (number, faults)
            assert error.offset is not None, (number, faults)
            assert error.errno is not None or "ended here" in str(error), (number, faults, str(error))
        readers.close()
        file.close()
    emulator.set("reset")
    assert emulator.wait_until_clean() == {}
    assert outcomes["right"] > rounds // 4
    assert outcomes["error"] > rounds // 20
    path.unlink()
