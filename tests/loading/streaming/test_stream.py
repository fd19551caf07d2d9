"""Tensors that are handed out own their bytes, whatever the consumer does with them, and whenever it stops."""

import errno
import gc
import hashlib
import os
import random
import threading
import time
from pathlib import Path

import pytest
import torch

from engine_loader import CheckpointError, TransferError, open_checkpoint
from engine_loader.report.load_report import LoadReport
from tests.support.checkpoints import Entry, checkpoint, entry, tensor_bytes
from tests.support.resources import left_open, open_resources
from tests.support.sources import FakeFile, Stuck, open_fake
from tests.support.waiting import wait_for

SMALL_BUFFERS = {"block_bytes": "64KiB", "buffer_bytes": "1MiB", "io_bytes": "16KiB"}


def mixed_tensors() -> dict[str, Entry]:
    """Some 6 MiB in tensors smaller than a page, a block, the buffers, and larger than these, at odd offsets."""
    random_sizes = random.Random(1)
    sizes = [random_sizes.choice([0, 1, 3, 100, 4096, 17_000, 40_000, 70_000, 300_000]) for _ in range(60)]
    sizes[20] = sizes[21] = 1_300_001
    return {f"t{number}": entry("U8", [size], number) for number, size in enumerate(sizes)}


TENSORS = mixed_tensors()
HASHES = {name: hashlib.sha1(content).hexdigest() for name, (_, _, content) in TENSORS.items()}


def sha1(tensor: torch.Tensor) -> str:
    return hashlib.sha1(tensor_bytes(tensor)).hexdigest()


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    """The mixed tensors in three shards."""
    directory = tmp_path_factory.mktemp("mixed")
    names = list(TENSORS)
    for number in range(3):
        part = {name: TENSORS[name] for name in names[number * 20 : number * 20 + 20]}
        (directory / f"{number}.safetensors").write_bytes(checkpoint(part, padding=number))
    return directory


def test_a_consumer_that_keeps_nothing_sees_every_tensor_right(path, way):
    with open_checkpoint(path, **way, **SMALL_BUFFERS) as opened:
        assert {name: sha1(tensor) for name, tensor in opened.tensors()} == HASHES


def test_a_consumer_that_keeps_every_tensor_has_them_all_right_at_the_end(path, way):
    with open_checkpoint(path, **way, **SMALL_BUFFERS) as opened:
        kept = dict(opened.tensors())
        assert {name: sha1(tensor) for name, tensor in kept.items()} == HASHES
    gc.collect()
    assert {name: sha1(tensor) for name, tensor in kept.items()} == HASHES


def test_a_consumer_that_keeps_some_has_those_right(path, way):
    choose = random.Random(2)
    kept: dict[str, torch.Tensor] = {}
    with open_checkpoint(path, **way, **SMALL_BUFFERS) as opened:
        for _ in range(3):
            for name, tensor in opened.tensors():
                if choose.random() < 0.3:
                    kept[name] = tensor
                if choose.random() < 0.3 and kept:
                    del kept[choose.choice(list(kept))]
            assert all(sha1(tensor) == HASHES[name] for name, tensor in kept.items())


def test_a_part_of_a_tensor_keeps_its_memory(path, way):
    with open_checkpoint(path, **way, **SMALL_BUFFERS) as opened:
        ends = {name: tensor[-100:] for name, tensor in opened.tensors()}
    assert all(tensor_bytes(end) == TENSORS[name][2][-100:] for name, end in ends.items())


def test_what_a_consumer_writes_reaches_neither_other_tensors_nor_the_files(path, way):
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    with open_checkpoint(path, **way, **SMALL_BUFFERS) as opened:
        for name, tensor in opened.tensors():
            assert sha1(tensor) == HASHES[name]
            tensor.fill_(0xEE)
        assert {name: sha1(tensor) for name, tensor in opened.tensors()} == HASHES
        kept = [tensor.fill_(7) for _, tensor in opened.tensors()]
        assert {name: sha1(opened.get_tensor(name)) for name in opened} == HASHES
    assert all((tensor == 7).all() for tensor in kept)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before


def test_kept_tensors_do_not_change_when_the_files_do(tmp_path, way):
    for number in range(2):
        part = {name: TENSORS[name] for name in list(TENSORS)[number * 30 : number * 30 + 30]}
        (tmp_path / f"{number}.safetensors").write_bytes(checkpoint(part))
    with open_checkpoint(tmp_path, **way, **SMALL_BUFFERS) as opened:
        kept = dict(opened.tensors())
    for file in tmp_path.iterdir():
        with open(file, "r+b") as overwritten:
            overwritten.write(b"\xee" * file.stat().st_size)
    assert {name: sha1(tensor) for name, tensor in kept.items()} == HASHES


def test_tensors_can_be_handed_to_other_threads(path, way):
    """Buffers end on whatever thread lets go of them last."""
    wrong: list[str] = []
    held: list[tuple[str, torch.Tensor]] = []
    closed = threading.Event()

    def check() -> None:
        while not closed.is_set() or held:
            try:
                name, tensor = held.pop()
            except IndexError:
                time.sleep(0.001)
                continue
            if sha1(tensor) != HASHES[name]:
                wrong.append(name)

    threads = [threading.Thread(target=check) for _ in range(2)]
    for thread in threads:
        thread.start()
    with open_checkpoint(path, **way, **SMALL_BUFFERS) as opened:
        for _ in range(3):
            held += opened.tensors()
    closed.set()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_one_checkpoint_serves_many_threads(path, way):
    with open_checkpoint(path, **way, **SMALL_BUFFERS) as opened:
        found: dict[int, dict[str, str]] = {}

        def read(number: int) -> None:
            if number % 2:
                found[number] = {name: sha1(tensor) for name, tensor in opened.tensors()}
            else:
                found[number] = {name: sha1(opened.get_tensor(name)) for name in opened}

        threads = [threading.Thread(target=read, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert list(found.values()) == [HASHES] * 6


def test_several_streams_of_one_checkpoint_can_be_interleaved(path, way):
    with open_checkpoint(path, **way, **SMALL_BUFFERS) as opened:
        pairs = zip(opened.tensors(), opened.tensors(), strict=True)
        assert all(sha1(one) == sha1(other) == HASHES[name] for (name, one), (_, other) in pairs)


@pytest.mark.parametrize(
    "ending", ["finished", "abandoned", "closed-generator", "exception", "closed-meanwhile", "untouched"]
)
def test_whatever_ends_a_load_no_descriptor_and_no_thread_remains(path, way, ending):
    with open_checkpoint(path, **way, **SMALL_BUFFERS) as opened:
        assert len(list(opened.tensors())) == 60
    gc.collect()
    before = open_resources()
    for _ in range(3):
        with open_checkpoint(path, **way, **SMALL_BUFFERS) as opened:
            pairs = opened.tensors()
            if ending == "finished":
                assert len(list(pairs)) == 60
            elif ending != "untouched":
                next(pairs)
            if ending == "closed-generator":
                pairs.close()
            if ending == "exception":
                with pytest.raises(ZeroDivisionError):
                    for _, _tensor in pairs:
                        raise ZeroDivisionError
            if ending == "closed-meanwhile":
                opened.close()
                with pytest.raises(CheckpointError, match=r"closed|cancelled"):
                    list(pairs)
            del pairs
    gc.collect()
    assert left_open(before) == []


def address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")


def test_a_stream_that_is_abandoned_gives_its_memory_back(path, way):
    """Also that of reads which were cancelled before they began."""
    with open_checkpoint(path, **way, **SMALL_BUFFERS) as opened:
        next(opened.tensors())
        before = address_space()
        for _ in range(60):
            next(opened.tensors())
        gc.collect()
        assert address_space() - before < 8 << 20


def test_tensors_stay_valid_after_close(path, way):
    with open_checkpoint(path, **way, **SMALL_BUFFERS) as opened:
        pairs = opened.tensors()
        kept = [next(pairs) for _ in range(40)]
    del pairs
    gc.collect()
    assert all(sha1(tensor) == HASHES[name] for name, tensor in kept)


@pytest.mark.parametrize("use", ["tensors", "get_tensor", "get_slice", "load_into"])
def test_a_closed_checkpoint_says_so(path, way, use):
    opened = open_checkpoint(path, **way)
    part = opened.get_slice("t5")
    opened.close()
    opened.close()
    calls = {
        "tensors": lambda: next(opened.tensors()),
        "get_tensor": lambda: opened.get_tensor("t5"),
        "get_slice": lambda: part[...],
        "load_into": lambda: opened.load_into({"t5": torch.zeros(TENSORS["t5"][1], dtype=torch.uint8)}),
    }
    assert TENSORS["t5"][2]
    with pytest.raises(CheckpointError, match="the checkpoint is closed"):
        calls[use]()
    assert opened.keys() == list(TENSORS)


def test_a_name_that_is_not_there_is_said_before_anything_is_read(path, way):
    with open_checkpoint(path, **way) as opened, pytest.raises(CheckpointError, match="no tensor named 'x'"):
        opened.tensors(["x"])


def test_the_account_counts_what_was_handed_out(path, way):
    report = LoadReport()
    with open_checkpoint(path, **way, **SMALL_BUFFERS) as opened:
        for _name, _tensor in opened.tensors(["t20", "t21", "t45"], report=report):
            pass
    nbytes = sum(len(TENSORS[name][2]) for name in ("t20", "t21", "t45"))
    assert (report.tensors, report.files, report.bytes_loaded) == (3, 2, nbytes)
    assert report.source == "posix"
    assert sum(report.modes.values()) >= nbytes
    assert "loaded 2." in report.line()


def test_the_line_at_the_end_says_that_reads_were_tried_again():
    file = FakeFile(checkpoint({f"t{n}": entry("U8", [200_000], n) for n in range(4)}))
    report, failed = LoadReport(), []

    def fails_once(offset, wanted):
        if offset > 1000 and not failed:
            failed.append(offset)
            raise OSError(errno.EIO, "")
        return wanted

    file.behave = fails_once
    with open_fake(file, **SMALL_BUFFERS) as opened:
        for _ in opened.tensors(report=report):
            pass
    assert failed and report.line().endswith(f"; 1 read tried again, the first in {file.path} (EIO)")


def test_memory_in_use_is_bounded_by_the_buffers_or_two_large_tensors():
    file = FakeFile(checkpoint({f"t{n}": entry("U8", [200_000], n) for n in range(40)}))
    report = LoadReport()
    with open_fake(file, **SMALL_BUFFERS) as opened:
        for _ in opened.tensors(report=report):
            pass
    assert 0 < report.peak_buffer_bytes <= 1 << 20
    large = FakeFile(checkpoint({f"t{n}": entry("U8", [3 << 20], n) for n in range(4)}))
    report = LoadReport()
    with open_fake(large, **SMALL_BUFFERS) as opened:
        for _ in opened.tensors(report=report):
            pass
    assert 3 << 20 <= report.peak_buffer_bytes <= 2 * (4 << 20)


def test_only_the_named_tensors_are_read():
    file = FakeFile(checkpoint({f"t{n}": entry("U8", [100_000], n) for n in range(10)}))
    with open_fake(file, **SMALL_BUFFERS) as opened:
        file.reads.clear()
        assert [name for name, _ in opened.tensors(["t7", "t2"])] == ["t2", "t7"]
    assert file.bytes_read == 200_000


def test_reading_goes_ahead_of_the_consumer_but_not_without_bound():
    file = FakeFile(checkpoint({f"t{n}": entry("U8", [60_000], n) for n in range(100)}))
    with open_fake(file, **SMALL_BUFFERS) as opened:
        file.reads.clear()
        pairs = opened.tensors()
        next(pairs)
        wait_for(lambda: file.bytes_read >= 3 * 60_000)
        time.sleep(0.05)
        assert file.bytes_read <= 1 << 20


def test_an_error_in_the_middle_reaches_the_consumer_after_the_tensors_before_it():
    content = checkpoint({f"t{n}": entry("U8", [60_000], n) for n in range(20)})
    file = FakeFile(content)
    with open_fake(file, **SMALL_BUFFERS) as opened:
        broken = opened.info("t10").offset

        def behave(offset: int, wanted: int) -> int:
            if offset + wanted > broken:
                raise OSError(5, "I/O error")
            return wanted

        file.behave = behave
        names = []
        with pytest.raises(
            TransferError, match=r"/fake\.safetensors: at byte \d+: could not read: .*EIO.* after 5 tries"
        ):
            for name, _ in opened.tensors():
                names.append(name)
        assert names == [f"t{n}" for n in range(10)]
        file.behave = lambda offset, wanted: wanted
        assert len(list(opened.tensors())) == 20


def test_a_cancelled_load_returns_though_a_read_hangs():
    file = FakeFile(checkpoint({f"t{n}": entry("U8", [60_000], n) for n in range(20)}))
    stuck = Stuck()
    try:
        opened = open_fake(file, **SMALL_BUFFERS)
        hangs = opened.info("t5").offset

        def behave(offset: int, wanted: int) -> int:
            return stuck(offset, wanted) if offset >= hangs else wanted

        file.behave = behave
        pairs = opened.tensors()
        next(pairs)
        wait_for(lambda: stuck.reads)
        pairs.close()
        opened.close()
        assert stuck.reads
    finally:
        stuck.release()
